"""The launcher on two hosts that are made here: network namespaces with a name, an address, and an sshd of their own.

Each host also has its own processes (a PID namespace: killing its first process ends the host) and its own mounts. The
two are joined by one cable (a veth pair) and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ADDRESSES = {"node-a": "10.231.7.1", "node-b": "10.231.7.2"}
NEEDED = ("ip", "setpriv", "unshare", "nsenter", "sshd", "ssh", "ssh-keygen", "pdsh")
TOOLS = f"{os.environ['PATH']}:/usr/sbin:/sbin"
RUN_S = 600  # limits of hangs: a run takes 20 s on an idle machine
END_S = 180  # a vanished node is given up after 60 s; the rest is for busy machines
# A host and all that runs in it ends with this test's process, even if that is killed: nothing is left to clean up.
HOST = ("setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--uts", "--pid", "--ipc", "--fork")
HOST += ("--kill-child", "bash", "-c")
BOOT = """set -e
mount -t proc proc /proc
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh_config" /etc/ssh/ssh_config
mkdir -p /run/sshd
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip address add "$3/24" dev eth0
ip link set eth0 up
ip link set lo up
exec "$(command -v sshd)" -D -e -f "$2/sshd_$1"
"""


def what_is_missing() -> str:
    """Empty if this machine can make hosts."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux (network namespaces)"
    if missing := [name for name in NEEDED if shutil.which(name, path=TOOLS) is None]:
        return f"needs {', '.join(missing)} (apt-get install openssh-server pdsh iproute2)"
    if subprocess.run([*HOST, "true"], capture_output=True).returncode:
        return "needs the right to make namespaces"
    return ""


MISSING = what_is_missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]


class Hosts:
    """node-a and node-b. `folder` holds keys and logs; everything below the root file system is shared."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._networks: list[int] = []

    def start(self) -> None:
        """Boots both, lays the cable, and waits until their sshds listen."""
        self._write_files()
        for name, address in ADDRESSES.items():
            with (self.folder / f"sshd_{name}.log").open("wb") as log:
                self._processes[name] = subprocess.Popen(
                    [*HOST, BOOT, "bash", name, str(self.folder), address],
                    stderr=log,
                    env=os.environ | {"PATH": TOOLS},
                )
        for name, process in self._processes.items():
            wait_until(lambda name=name: self._first_process(name) != "", process)
        a, b = (str(process.pid) for process in self._processes.values())
        # Held open: when a host dies, its end of the cable stays, and with it the other host's interface.
        self._networks = [os.open(f"/proc/{pid}/ns/net", os.O_RDONLY) for pid in (a, b)]
        run("ip", "link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
        for name, process in self._processes.items():
            log_path = self.folder / f"sshd_{name}.log"
            wait_until(lambda path=log_path: "listening" in path.read_text(), process)

    def kill(self, name: str) -> None:
        """As if its power went: every process ends at once, without a handler."""
        self._processes[name].kill()  # the kernel kills the host's first process with it, and so all of them
        self._processes[name].wait()

    def cut_cable(self) -> None:
        run(*self.command("node-b", "ip", "link", "set", "eth0", "down"))

    def command(self, name: str, *arguments: str) -> list[str]:
        """`arguments` as they are run on that host, in the repository."""
        enter = [
            "nsenter",
            "--target",
            self._first_process(name),
            "--net",
            "--uts",
            "--pid",
            "--mount",
            "--ipc",
            "--",
        ]
        return [*enter, "env", f"--chdir={ROOT}", *arguments]

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
        for network in self._networks:
            os.close(network)

    def _first_process(self, name: str) -> str:
        """As this machine numbers it; empty before the host is up."""
        unshare = self._processes[name].pid
        return Path(f"/proc/{unshare}/task/{unshare}/children").read_text().partition(" ")[0]

    def _write_files(self) -> None:
        folder = self.folder
        for key in ("host_key", "user_key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        public = (folder / "host_key.pub").read_text()
        names = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (folder / "known_hosts").write_text(
            "".join(f"{name},{address} {public}" for name, address in ADDRESSES.items())
        )
        (folder / "ssh_config").write_text(
            f"Host *\nIdentityFile {folder}/user_key\nIdentitiesOnly yes\nUserKnownHostsFile {folder}/known_hosts\n"
            "BatchMode yes\nServerAliveInterval 15\nServerAliveCountMax 3\n"
        )
        for name, address in ADDRESSES.items():
            (folder / f"sshd_{name}").write_text(
                f"ListenAddress {address}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\n"
                "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPidFile none\n"
            )


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], what: str = "") -> None:
    deadline_s = time.monotonic() + RUN_S
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline_s, f"{process.args}: {what}"
        time.sleep(0.05)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    result = Hosts(tmp_path)
    try:
        result.start()
        yield result
    finally:
        result.close()


class Training:
    """The judge of the quickstart, tiny, on hosts; its output goes to a file."""

    def __init__(self, hosts: Hosts, tiny_judge: Callable[..., list[str]], steps: int = 6) -> None:
        self.hosts, self.folder, self.run_dir = hosts, hosts.folder, hosts.folder / "run"
        (self.folder / "env").write_text("GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\n")
        self.arguments = tiny_judge(self.run_dir, f"engine.steps={steps}")

    def hostfile(self, **slots: int) -> list[str]:
        path = self.folder / "hostfile"
        path.write_text("".join(f"node-{name} slots={number}\n" for name, number in slots.items()))
        return ["--hostfile", str(path)]

    def start(self, host: str, options: list[str], *extra: str) -> subprocess.Popen[bytes]:
        """`deepspeed` on `host`, as a person there would start it."""
        binaries = str(Path(sys.executable).parent)
        variables = {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "DS_ENV_FILE": str(self.folder / "env"),
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
        }
        command = self.hosts.command(host, "deepspeed", *options, *self.arguments, *extra)
        with (self.folder / f"output_{host}").open("ab") as output:
            return subprocess.Popen(
                command, env=os.environ | variables, stdout=output, stderr=subprocess.STDOUT
            )

    def output(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("output_*")))

    def end(self, process: subprocess.Popen[bytes], within_s: int = RUN_S) -> int:
        """The exit status; a run that hangs fails the test."""
        try:
            return process.wait(within_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"did not end within {within_s} s:\n{self.output()}") from None

    def reach(self, step: int, process: subprocess.Popen[bytes]) -> None:
        wait_until(lambda: len(self.curve()) >= step, process, self.output())

    def curve(self) -> list[float]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        losses = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # being written
                losses.append(json.loads(line)["loss"])
        return losses

    def weights(self) -> bytes:
        return (self.run_dir / "export" / "model.safetensors").read_bytes()

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.run_dir / "checkpoints").glob("step_*"))


def test_two_hosts_train_as_one_host_with_two_ranks_with_and_without_ssh(hosts, tiny_judge) -> None:
    """Bit for bit: two ranks add two numbers, and that has one order."""
    training = Training(hosts, tiny_judge)
    alone = training.start("node-a", training.hostfile(a=2))
    assert training.end(alone) == 0, training.output()
    weights, curve = training.weights(), training.curve()
    assert len(curve) == 6

    shutil.rmtree(training.run_dir)
    assert training.end(training.start("node-a", training.hostfile(a=1, b=1))) == 0, training.output()
    assert "node-b: " in training.output(), "pdsh puts the host before each line"
    assert training.weights() == weights and training.curve() == curve

    shutil.rmtree(training.run_dir)
    options = [*training.hostfile(a=1, b=1), "--no_ssh", "--master_addr", "node-a", "--master_port", "29511"]
    both = [training.start(f"node-{name}", [*options, "--node_rank", str(i)]) for i, name in enumerate("ab")]
    assert [training.end(process) for process in both] == [0, 0], training.output()
    assert training.weights() == weights and training.curve() == curve


@pytest.mark.parametrize(("accident", "num_ranks"), [("power", 1), ("cable", 2)])
def test_a_lost_host_is_named_and_the_rest_goes_on_from_the_checkpoint(
    accident, num_ranks, hosts, tiny_judge
) -> None:
    """Without the lost host's rank, or with it on the host that is left."""
    training = Training(hosts, tiny_judge, steps=60)
    process = training.start("node-a", training.hostfile(a=1, b=1))
    training.reach(5, process)
    if accident == "power":
        hosts.kill("node-b")
    else:
        hosts.cut_cable()
    assert training.end(process, END_S) != 0
    errors = [line for line in training.output().splitlines() if "error: " in line]
    assert len(errors) == 1 and "rank 0: lost contact with node-b (rank 1)" in errors[0], training.output()
    assert "Traceback" not in training.output()

    step = int(training.checkpoints()[-1].removeprefix("step_"))
    assert 4 <= step < 60
    again = training.start("node-a", training.hostfile(a=num_ranks), f"engine.steps={step + 2}")
    assert training.end(again) == 0, training.output()
    assert f"resumed at step {step}/{step + 2}" in training.output()
    assert len(training.curve()) == step + 2


@pytest.mark.parametrize("mistake", ["before the ranks meet", "while they train"])
def test_a_mistake_on_one_host_ends_both_with_its_status(mistake, hosts, tiny_judge) -> None:
    """A data set that one host does not have; a damaged picture that one rank meets."""
    training = Training(hosts, tiny_judge, steps=40)
    options = [*training.hostfile(a=1, b=1), "--no_ssh", "--master_addr", "node-a", "--master_port", "29513"]
    extra: dict[str, str] = {}
    shards = next(word for word in training.arguments if word.startswith("data.shards=")).partition("=")[2]
    if mistake == "while they train":
        copy = training.folder / "shards"
        shutil.copytree(shards, copy)
        tar = next(iter(sorted(copy.glob("*.tar"))))
        content = bytearray(tar.read_bytes())
        begin = content.index(b"IDAT")
        content[begin + 8 : begin + 40] = bytes(32)
        tar.write_bytes(content)
        extra = {"a": f"data.shards={copy}", "b": f"data.shards={copy}"}
    else:
        extra = {"b": f"data.shards={training.folder / 'nowhere'}"}
    both = [
        training.start(
            f"node-{name}", [*options, "--node_rank", str(i)], *([extra[name]] if name in extra else [])
        )
        for i, name in enumerate("ab")
    ]
    assert [training.end(process, END_S) for process in both] == [2, 2], training.output()
    errors = [line for line in training.output().splitlines() if "error: " in line]
    assert len(errors) == 1 and "Traceback" not in training.output(), training.output()


def test_a_stopped_launcher_lets_both_hosts_save(hosts, tiny_judge) -> None:
    """The pipes to the terminal are gone by then: printing must not end the ranks."""
    training = Training(hosts, tiny_judge, steps=2000)
    arguments = ("engine.checkpoint_every_steps=1000",)
    process = training.start("node-a", training.hostfile(a=1, b=1), *arguments)
    training.reach(3, process)
    launcher = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
    os.kill(int(launcher), signal.SIGTERM)
    assert training.end(process) != 0
    deadline_s = time.monotonic() + RUN_S
    while not training.checkpoints():
        assert time.monotonic() < deadline_s, training.output()
        time.sleep(0.1)


def test_a_host_with_another_config_or_another_run_folder_is_named(hosts, tiny_judge) -> None:
    training = Training(hosts, tiny_judge)
    options = [*training.hostfile(a=1, b=1), "--no_ssh", "--master_addr", "node-a", "--master_port", "29512"]
    training.run_dir.mkdir()
    run(*hosts.command("node-b", "mount", "-t", "tmpfs", "tmpfs", str(training.run_dir)))
    both = [
        training.start("node-a", [*options, "--node_rank", "0"]),
        training.start("node-b", [*options, "--node_rank", "1"], "engine.optimizer.lr=1"),
    ]
    assert [training.end(process) for process in both] == [2, 2], training.output()
    errors = [line for line in training.output().splitlines() if "error: " in line]
    assert len(errors) == 1
    assert "error: node-b (rank 1): config engine.optimizer.lr 1.0 where node-a has 0.003" in errors[0]
    training.arguments[0:] = [
        "launch/check_nodes.py",
        *training.arguments[1:3],
        "--run-dir",
        str(training.run_dir),
    ]
    config = training.arguments[1:3]
    training.arguments = ["launch/check_nodes.py", *config, "--run-dir", str(training.run_dir)]
    assert training.end(training.start("node-a", training.hostfile(a=1, b=1))) == 2
    found = [line for line in training.output().splitlines() if "FOUND" in line]
    assert len(found) == 1 and f"node-b (rank 1): run_dir {training.run_dir} is not the folder" in found[0]
    assert "node-a -> node-b: " in training.output() and "node-b -> node-a: " in training.output()
