"""An engine of one process opens no TCP port for its process groups."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.engine

ALONE = """
import datetime, os, torch
from pipeline.engine.sglang.ports import close_ports
close_ports()
dist = torch.distributed
dist.init_process_group(backend="gloo", init_method="tcp://127.0.0.1:0", world_size=1, rank=0)
group = dist.new_group([0], backend="gloo")
tensor = torch.tensor([3, 4])
dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=group)
gathered, told = [None], [{"b": 2}]
dist.all_gather_object(gathered, {"a": 1}, group=group)
dist.broadcast_object_list(told, src=0, group=group)
dist.monitored_barrier(group=group, timeout=datetime.timedelta(seconds=5), wait_all_ranks=True)
assert tensor.tolist() == [3, 4] and gathered == [{"a": 1}] and told == [{"b": 2}]
links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
mine = {os.readlink(link) for link in links if os.path.lexists(link)}
rows = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/self/net/{name}").readlines()[1:]]
print("listening:", [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine])
"""


def test_a_group_of_one_does_its_collectives_without_a_port() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "listening: []"
