import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from colfolio.distributed import is_in_world, join, join_world, launch, launcher, whole
from colfolio.distributed.join import Place, find_place
from colfolio.distributed.launcher import run_ranks
from colfolio.distributed.world import World
from colfolio.errors import ColfolioError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "here",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]-a,big1",
    "SLURM_JOB_ID": "10123",
}
JOINED = """
import sys
from colfolio.distributed import end_rank, is_in_world, join_world
assert is_in_world()
with join_world("cpu") as world:
    counts = world.gather_counts(world.rank + 5)
    with open(f"{sys.argv[1]}/{world.rank}", "w") as file:
        file.write(f"{world.size} {world.local_rank} {world.local_size} {counts}")
end_rank(0)
"""
ENDING = """
import atexit
from colfolio.distributed import end_rank
atexit.register(print, "wound up")
print("trained")
end_rank(3)
"""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in {*TORCHRUN, *SRUN, "LOCAL_WORLD_SIZE", "SLURM_STEP_ID"}:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that so many GPUs are visible."""

    def pretend(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


@pytest.mark.parametrize(
    ("launcher", "code", "output"),
    [({}, 0, "trained\nwound up\n"), (TORCHRUN, 3, "trained\n"), (SRUN, 3, "trained\n")],
)
def test_a_rank_ends_without_winding_up_the_interpreter(launcher, code, output):
    ended = subprocess.run(
        [sys.executable, "-c", ENDING],
        env={**os.environ, **launcher},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (code, output)


def python(code):
    return [sys.executable, "-P", "-c", code]


def test_no_launcher_is_a_world_of_one():
    assert find_place({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}) is None
    assert not is_in_world()
    with join_world() as world:
        assert world == World()
        assert not dist.is_initialized()


def test_a_launcher_of_one_process_is_a_world_of_one(monkeypatch):
    for name, value in (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    assert is_in_world()
    with join_world("cuda:1") as world:
        assert world == World()


def test_variables_of_torchrun_win_over_those_of_srun():
    assert find_place(SRUN | TORCHRUN) == Place(3, 4, 1, "env://")


def test_srun_meets_at_the_first_host_on_a_port_of_the_job():
    assert find_place(SRUN) == Place(3, 4, 1, "tcp://gpu07-a:15123")
    assert find_place(SRUN | {"SLURM_STEP_ID": "2"}) == Place(3, 4, 1, "tcp://gpu07-a:15125")
    given = SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    assert find_place(given) == Place(3, 4, 1, "tcp://10.0.0.1:4000")


@pytest.mark.parametrize("missing", TORCHRUN)
def test_a_missing_variable_of_torchrun_is_named(missing):
    found = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(ColfolioError, match=f"not {missing}:"):
        find_place(found)


@pytest.mark.parametrize("missing", [name for name in SRUN if name != "SLURM_STEP_NUM_TASKS"])
def test_a_missing_variable_of_srun_is_named(missing):
    found = {name: value for name, value in SRUN.items() if name != missing}
    with pytest.raises(ColfolioError, match=f"not {missing}:"):
        find_place(found)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "one", "RANK must be a whole number, found 'one'"),
        ("RANK", "4", "RANK must be below WORLD_SIZE"),
        ("RANK", "-1", "RANK must be below WORLD_SIZE"),
        ("LOCAL_RANK", "5", "LOCAL_RANK not above it: found 3, 4 and 5"),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused(name, value, message):
    with pytest.raises(ColfolioError, match=message):
        find_place(TORCHRUN | {name: value})


def test_more_ranks_on_a_host_than_gpus_are_refused(monkeypatch, gpus):
    for name, value in (TORCHRUN | {"LOCAL_RANK": "2"}).items():
        monkeypatch.setenv(name, value)
    gpus(2)
    with pytest.raises(ColfolioError, match="LOCAL_RANK is 2, but 2 GPUs"), join_world("cuda"):
        pass


def test_a_rank_does_not_choose_its_gpu(monkeypatch, gpus):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    gpus(4)
    with pytest.raises(ColfolioError, match="'cuda:1': each of 4 ranks"), join_world("cuda:1"):
        pass


def test_ranks_that_share_a_gpu_are_named(monkeypatch):
    class SamePlace:
        rank, local_rank = 1, 1

        def gather_objects(self, value):
            return [value, value]

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = type("Properties", (), {"uuid": "GPU-7"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    # beartype would refuse the stand-in
    check = getattr(join._check_gpus, "__wrapped__", join._check_gpus)
    with pytest.raises(ColfolioError, match=r"ranks 0 and 1 have the same GPU \(GPU-7\)"):
        check(SamePlace())


def test_a_process_group_that_is_there_is_used_and_kept(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 's'}", rank=0, world_size=1)
    try:
        assert is_in_world()
        with join_world() as world:
            assert (world.rank, world.size, world.local_rank, world.local_size) == (0, 1, 0, 1)
        assert dist.is_initialized()
        with pytest.raises(ColfolioError, match="is a rank of a world already"):
            launch(["train"], 2)
    finally:
        dist.destroy_process_group()


def test_a_rank_starts_no_ranks(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ColfolioError, match="is a rank of a world already"):
        launch(["train"], 2)


def test_a_tensor_that_is_not_spread_is_whole():
    tensor = torch.ones(2)
    assert whole(tensor) is tensor


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0, 0), 0), ((0, 2), 2), ((1, 0), 1), ((130, 130), 130), ((0, 130), 130)],
)
def test_the_exit_code_of_a_failed_rank_survives(codes, expected):
    code = f"import os, sys; sys.exit({codes}[int(os.environ['RANK'])])"
    assert run_ranks(python(code), 2) == expected


def test_a_rank_that_a_signal_ended_is_a_failure():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_ranks(python(code), 1) == 128 + signal.SIGKILL


def environment_of_ranks(names, ranks, folder):
    """What each rank finds in these variables, in a file of its own: they print at once."""
    folder.mkdir()
    code = "import os, sys\nwith open(sys.argv[1] + os.environ['RANK'], 'w') as file:\n"
    code += f"  print(*(os.environ[name] for name in {names}), file=file)"
    assert run_ranks([*python(code), f"{folder}/"], ranks) == 0
    return [(folder / str(rank)).read_text(encoding="utf-8").split() for rank in range(ranks)]


def test_ranks_know_their_place(tmp_path):
    names = "LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR TORCHELASTIC_USE_AGENT_STORE"
    found = environment_of_ranks(names.split(), 2, tmp_path / "ranks")
    assert found == [[str(rank), "2", "2", "127.0.0.1", "True"] for rank in range(2)]


def test_threads_are_shared_out_unless_the_user_has_said(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environment_of_ranks(["OMP_NUM_THREADS"], 3, tmp_path / "shared") == [["2"]] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert environment_of_ranks(["OMP_NUM_THREADS"], 1, tmp_path / "said") == [["7"]]


def test_ranks_that_wait_for_a_failed_one_are_ended(monkeypatch):
    monkeypatch.setattr(launcher, "_GRACE_SECONDS", 0.3)
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    code = f"import os, signal, sys, time\nif os.environ['RANK'] == '0':\n  {stubborn}\nsys.exit(2)"
    begin = time.monotonic()
    assert run_ranks(python(code), 2) == 2
    assert time.monotonic() - begin < 30


def interrupted(code, times, ready, folder):
    """The exit code of two ranks, of which each writes a file once it is ready."""

    def interrupt():
        while len(list(folder.iterdir())) < ready:
            time.sleep(0.02)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        return run_ranks([*python(code), str(folder)], 2)
    finally:
        thread.join()


_COUNTING = """
import os, signal, sys, time
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
open(f"{sys.argv[1]}/{os.environ['RANK']}", "w").close()
"""


def test_ctrl_c_reaches_each_rank_once(tmp_path):
    code = _COUNTING + "while not asked: time.sleep(0.02)\ntime.sleep(0.5)\n"
    code += "sys.exit(130 if len(asked) == 1 else 3)"
    assert interrupted(code, 1, 2, tmp_path) == 130


def test_ranks_may_save_after_ctrl_c_as_long_as_they_need(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "_GRACE_SECONDS", 0.1)
    code = _COUNTING + "while not asked: time.sleep(0.02)\n"
    code += "if os.environ['RANK'] == '0':\n  time.sleep(1.5)\n"
    code += "  open(f'{sys.argv[1]}/saved', 'w').close()\nsys.exit(130)"
    assert interrupted(code, 1, 2, tmp_path) == 130
    assert (tmp_path / "saved").exists()


def test_the_third_ctrl_c_kills(tmp_path):
    code = _COUNTING + "time.sleep(60); time.sleep(60); time.sleep(60)"
    assert interrupted(code, 3, 2, tmp_path) == 128 + signal.SIGKILL


def test_signals_are_as_they_were_afterwards():
    before = signal.getsignal(signal.SIGINT)
    run_ranks(python("pass"), 1)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
@pytest.mark.parametrize("program", ["torchrun", "accelerate", "colfolio"])
def test_a_world_is_joined_under_each_launcher(tmp_path, program):
    script, found = tmp_path / "joined.py", tmp_path / "found"
    script.write_text(JOINED, encoding="utf-8")
    found.mkdir()
    run = [sys.executable, "-P", "-m"]
    arguments = [str(script), str(found)]
    if program == "colfolio":
        assert run_ranks([sys.executable, "-P", *arguments], 2) == 0
    elif program == "torchrun":
        command = [*run, "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        subprocess.run([*command, *arguments], check=True, timeout=120)
    else:
        pytest.importorskip("accelerate")
        options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
        command = [*run, "accelerate.commands.launch", *options.split(), "--dynamo_backend", "no"]
        subprocess.run([*command, *arguments], check=True, timeout=120)
    written = [(found / str(rank)).read_text(encoding="utf-8") for rank in range(2)]
    assert written == ["2 0 2 [5, 6]", "2 1 2 [5, 6]"]


@pytest.mark.slow
def test_the_command_line_runs_in_ranks(capfd):
    assert launch(["--help"], 1) == 0
    assert "Usage" in capfd.readouterr().out
    assert launch(["no-such-command"], 2) == 2
