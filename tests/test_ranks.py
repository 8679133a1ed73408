import os, time
import pytest
from gdyn.errors import UserError
from tests.harness import run_ranks as rr, RanksFailed

def ident(here, x):
    return here.rank, here.any(here.rank == 1), here.gather(here.rank), here.broadcast("x" if here.main else None), x, here.evidence

def fails(here):
    with here.together():
        if here.rank == 1: raise UserError("bad")

def dies(here):
    if here.rank == 1: os._exit(3)
    here.barrier()

def test_a(run_ranks):
    print(run_ranks(2, ident, 5))
def test_a4(run_ranks):
    print(run_ranks(4, ident, 5))
def test_b(run_ranks):
    with pytest.raises(RanksFailed) as c: run_ranks(2, fails)
    print(c.value.errors, c.value)
def test_c(run_ranks):
    with pytest.raises(RanksFailed) as c: run_ranks(2, dies)
    print(c.value.errors)
