"""Several GPUs on paper."""

import pytest

from onn_core.run.estimate import geometry_of
from onn_core.weights.geometry import geometry
from onn_workbench.scaling import Host, predict

# of one host with H100s, measured
HOST = Host(flops_per_s=5e14, copy_bytes_per_s=55e9, exchange_bytes_per_s=149e9)


@pytest.fixture(scope="module")
def llama():
    return geometry_of(geometry("llama-3-8b"), on_cpu=False)


def predicted(llama, batch_size, n_gpus, host=HOST, **more):
    return predict(llama, batch_size, 512, host, n_gpus=n_gpus, memory_budget="4GB", **more)


def test_where_compute_is_the_limit_four_gpus_do_four_times_as_much(llama):
    one, four = predicted(llama, 128, 1), predicted(llama, 512, 4)
    assert one["limited_by"] == four["limited_by"] == "compute"
    assert four["tokens_s"] >= 0.9 * 4 * one["tokens_s"]


def test_where_the_copy_is_the_limit_only_an_exchange_helps(llama):
    one, four = predicted(llama, 4, 1), predicted(llama, 4, 4)
    assert one["limited_by"] == four["limited_by"] == "fetch"
    assert one["step_s"] >= 2 * four["step_s"]
    assert four["fetch_s"] == pytest.approx(one["fetch_s"] * 55 / 149, rel=0.1)
    apart = Host(HOST.flops_per_s, HOST.copy_bytes_per_s)
    alone = predicted(llama, 1, 1)  # on its part of the batch
    assert predicted(llama, 4, 4, apart)["fetch_s"] == pytest.approx(alone["fetch_s"])


def test_hosts_that_share_a_slow_network_are_limited_by_it(llama):
    slow = Host(HOST.flops_per_s, HOST.copy_bytes_per_s, network_bytes_per_s=1e7)
    found = predicted(llama, 8, 1, slow, n_hosts=2)
    assert found["limited_by"] == "gradients" and found["gpus"] == 2
