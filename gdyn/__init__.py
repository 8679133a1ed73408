"""gdyn: train graph networks on molecular data, exactly, on any number of ranks. A map:

phases, phase_best                       what is next, in pure arithmetic; whether a phase ends early, what it leaves
rundir, errors, extras                   where things of a run go; what a user can cause; packages that may be missing
sites, schedulers                        a machine's script and facts; its queue
run_files, jobs, submission              a run file without torch; a request made into a job; written and handed in
supervisor, attempts, processes          what a job script starts: restarts, spares, hand-over; what files say
planning, comparison                     what more nodes would cost; runs side by side
lint                                     what is known to be wrong with a job script: reader, rules, findings
recipes, ds_config, ds_keys, ds_machine  the DeepSpeed JSON: found, completed, checked against DeepSpeed and machine
ranks, launchers, rendezvous, signals    who this process is, how it was found, where ranks meet; who asks to stop
watchdog, failures                       a rank that gets nowhere ends the job; the rank at fault is named
preflight                                is this job healthy: links, storage, memory, versions; which node is to blame
engine, engines, nn, collectives         the contract of a model family; the families and what they share
config, gdynet                           a run file, ours or GDyNet's, read into a RunConfig
trainer, window, ds_engine               the one loop; one optimizer step; DeepSpeed's engine, made and let go
loader, splits, checkpoints              whole windows in; samples held out by name; positions saved and found
optimizer, learning_rate, schedules      parameter groups and Muon; learning rates over a run; other numbers over steps
metrics, progress, loss_curves           means and logs of a run; what a person sees; a picture of each phase
inference, evaluation, report            a finished run read back, scored, shown
cli                                      `gdyn train|analyze|...`, the programs of launch/
"""

__version__ = "0.1.0"
