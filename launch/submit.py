"""gdyn submit: make a job script for a machine, show what it will cost, and hand it in.

gdyn submit --site frontier --nodes 64 --time 2:00:00 --account ABC123 run.yaml

Every machine is a file in job_templates/ (or one of your own), and may have options of its own:
gdyn submit --site frontier --help shows them.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script: this folder on the path would shadow other packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import platform
import socket
import subprocess
from typing import Any

from jsonargparse import ArgumentParser

from gdyn import jobs, run_files, rundir, schedulers, sites, submission
from gdyn.cli import guarded
from gdyn.errors import UserError
from gdyn.jobs import Job, Request
from gdyn.sites import Site


def parser(site: Site | None) -> ArgumentParser:
    """Of `gdyn submit`, with the options that only this site has."""
    result = ArgumentParser(prog="gdyn submit", description=__doc__, exit_on_error=False)
    add = result.add_argument
    add("run_file", type=Path, help="the run file (YAML); relative paths in it start from this folder")
    add("--site", default="auto", help=f"{', '.join(sites.sites())}, a site file of your own, or auto: by host name")
    add("--nodes", type=int, default=1, help="nodes to run on")
    add("--ranks_per_node", type=int, help="where the site does not say it")
    add("--time", help="wall time, e.g. 2:00:00")
    add("--account", help="the project that pays")
    add("--queue", help="partition, quality of service or queue, as the site calls it")
    add("--name", help="of the job; default: of the run folder")
    add("--dry_run", action="store_true", help="print the script, write and submit nothing")
    add("--plan", action="store_true", help="what more nodes would cost, from a short run in the same run folder")
    add("--samples", type=int, help="of the training set, for --plan, where the run did not note it")
    add("--chain", type=int, default=1, help="so many jobs, each going on where the one before stopped")
    add("--requeue", action="store_true", help="the job puts itself back into the queue when its time is up (Slurm)")
    add("--array", help="an ensemble: seeds=5, or runs=a.yaml,b.yaml (the run folder is then RUN_FILE's)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change the run file, e.g. engine.tau=5")
    add("--env", default="auto", help="conda:NAME, venv:PATH, none, a container, or auto: the one this runs in")
    add("--spares", type=int, default=0, help="nodes beyond --nodes that wait for one to fail")
    add("--max_restarts", type=int, help="after failures, within a job")
    add("--signal_seconds", type=int, default=300, help="how long before its end the job is told to save (Slurm)")
    add("--checkpoint_seconds", type=float, help="what saving takes: --signal_seconds must be twice that")
    add("--seconds_per_step", type=float, help="of training, to count the steps that fit")
    add("--preflight", choices=["on", "off"], default="on", help="off: do not test the nodes first")
    if site is not None:
        group = result.add_argument_group(f"only on {site.name}: {site.title}")
        for option in site.options:
            choices = f" ({', '.join(option.choices)})" if option.choices else ""
            default = f"; default: {option.default}" if option.default else ""
            group.add_argument(f"--{option.name}", help=option.help + choices + default)
    return result


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 if the user can mend it; without a scheduler, the job's own."""
    return guarded(lambda: submit(sys.argv[1:] if argv is None else argv))


def submit(argv: list[str]) -> int:
    """Raises: UserError."""
    site = _site(argv)
    options = parser(site).parse_args(argv)
    if site is None:
        host = socket.getfqdn()
        raise UserError(f"no site has login nodes like {host}; give --site, one of {', '.join(sites.sites())}.")
    request = _request(site, options)
    if options.plan:
        print(plan(request, options.samples))
        return rundir.DONE
    job = jobs.prepare(request, Path(__file__).resolve().parent)
    for line in [*(f"{name:<13} {value}" for name, value in _rows(job, options).items()), *job.cautions]:
        print(line, file=sys.stderr if options.dry_run else sys.stdout)
    if options.dry_run:
        print(job.script, end="")
        return rundir.DONE
    submission.refuse_if_alive(job.run_dir)
    script = submission.write(job)
    scheduler = schedulers.named(site.scheduler)
    if scheduler.name == "none":
        return run_here(job, script)
    ids = submission.hand_in(job, script, scheduler)
    print(f"submitted     {', '.join(ids)} ({script})")
    return rundir.DONE


def run_here(job: Job, script: Path) -> int:
    """Without a scheduler the job is this process; an ensemble's members run one after the other."""
    submission.note_jobs(job.run_dir, [str(os.getpid())])
    sys.stdout.flush()
    if not job.members:
        os.execvp("bash", ["bash", str(script)])
    code = rundir.DONE
    for i in range(len(job.members)):
        # The terminal's Ctrl-C reaches the member itself, which saves; this process waits for that.
        member = subprocess.Popen(["bash", str(script), str(i)])
        code = max(code, _wait(member))
        if code == rundir.STOPPED:
            break
    return code


def plan(request: Request, samples: int | None) -> str:
    """The table of `--plan`, up to the nodes asked for. Raises: UserError."""
    from gdyn import planning

    run_dir = run_files.run_folder(run_files.read(request.run_file, request.changes), request.run_file)
    measurement = planning.Measurement.read(run_dir.path)
    try:
        network = planning.Network.measured(run_dir.path)
    except UserError:  # no preflight, or of one node: the site's own numbers
        network = planning.Network(**request.site.facts["network"])
    samples = samples or measurement.samples
    if samples is None:
        raise UserError(f"{run_dir.path} does not say how many samples its training set has; give --samples.")
    rows = planning.plan(measurement, network, jobs.ranks_of_a_node(request), request.nodes, samples)
    return planning.table(rows, measurement, network)


def _wait(member: subprocess.Popen[bytes]) -> int:
    while True:
        try:
            return member.wait()
        except KeyboardInterrupt:
            continue


def _site(argv: list[str]) -> Site | None:
    """The site named in the arguments, or the one whose login node this is; needed before its options are known."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--site", default="auto")
    name = first.parse_known_args(argv)[0].site
    if name != "auto":
        return sites.read(name)
    return sites.detect(socket.getfqdn()) or sites.detect(platform.node())


def _request(site: Site, options: argparse.Namespace) -> Request:
    own = {option.name: getattr(options, option.name) for option in site.options}
    return Request(
        site=site,
        run_file=options.run_file,
        nodes=options.nodes,
        ranks_per_node=options.ranks_per_node,
        time=options.time,
        account=options.account,
        queue=options.queue,
        name=options.name,
        chain=options.chain,
        requeue=options.requeue,
        array=options.array,
        changes=tuple(options.set),
        env=options.env,
        spares=options.spares,
        max_restarts=options.max_restarts,
        signal_seconds=options.signal_seconds,
        checkpoint_seconds=options.checkpoint_seconds,
        preflight=options.preflight == "on",
        options={name: value for name, value in own.items() if value is not None},
    )


def _rows(job: Job, options: Any) -> dict[str, str]:
    seconds, source = options.seconds_per_step, "as given"
    if seconds is None and job.run_dir.metrics_jsonl.exists():
        from gdyn.planning import Measurement

        try:
            measurement = Measurement.read(job.run_dir.path)
            seconds, source = measurement.seconds, f"measured on {measurement.ranks} ranks"
        except UserError:  # too short a run to tell; the table says what to do
            pass
    return jobs.arithmetic(job, seconds, source)


if __name__ == "__main__":
    sys.exit(main())
