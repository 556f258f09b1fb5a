"""GPUs of one host that exchange parts of the weights train what they train without."""

import json
import os
import subprocess
import sys
import time

import jobs
import pytest
import torch
from small import require_equal, write_small
from test_processes import SAME, saved_step

import onn_core

N = 2
WIDE = SAME | {"batch_size": 4, "micro_batch_size": None, "loss_scale": None, "device": "cuda"}
WIDE |= {"memory_budget": "250MB", "host_budget": "2GB", "max_steps": 6}
ALWAYS, NEVER = -1.0, 1e9

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < N, reason="needs two GPUs"),
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Of 8 layers, 3 or so of which fit the budget."""
    return write_small(tmp_path_factory.mktemp("wide"), n_layers=8, hidden_size=1024)


def launch(wide, folder, **given):
    """A run on N GPUs: its exit code and what it wrote to standard error."""
    given |= {"small": [str(path) for path in wide], "output_dir": str(folder)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(N)]
    command = [sys.executable, *launcher, __file__, json.dumps(given)]
    environment = os.environ | {"ONN_GATHER": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, done.stderr


def test_parts_that_are_exchanged_make_the_same_run(wide, tmp_path):
    for name, share in (("exchanged", ALWAYS), ("alone", NEVER)):
        code, errors = launch(wide, tmp_path / name, **WIDE, share=share)
        assert code == 0, errors
        steps = onn_core.RunRecord.load(tmp_path / name / "record.json").steps
        # The first fills the host store, and what follows an evaluation begins otherwise.
        assert sum(step.gathered for step in steps) >= 3 * (share == ALWAYS)
        assert share == NEVER or all(step.layer_loads for step in steps if step.gathered)
        assert not steps[0].gathered and (share == ALWAYS or not any(s.gathered for s in steps))
    require_equal(tmp_path / "exchanged", tmp_path / "alone")


def test_what_is_killed_in_an_exchange_ends_all_within_a_minute(wide, tmp_path):
    given = WIDE | {"share": ALWAYS, "rank": 1, "how": "kill", "after": 3, "eval_every": 0}
    started = time.monotonic()
    code, errors = launch(wide, tmp_path, **given)
    assert code and saved_step(tmp_path) == "step-00000002", errors  # the last checkpoint
    assert time.monotonic() - started < 90  # of which opening takes a part


if __name__ == "__main__":  # in each process of `launch`
    jobs.run_gathering(**json.loads(sys.argv[1]))
