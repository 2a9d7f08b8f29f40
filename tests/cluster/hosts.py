"""Hosts that share nothing but a network, on one machine: namespaces with an address, processes and disk of their own.

Everything of a host belongs to its first process, which ends when this process does, however that ends: the kernel
then kills the host's other processes and takes its network and its mounts away. Only a folder of files may be left,
which the next network removes.
"""

import fcntl
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

PREFIX = "cxr-hosts-"
SUBNET, ROUTER = "10.77.0", "10.77.0.254"
BRIDGE = "switch"
NEEDED = ("ip", "unshare", "nsenter", "mount", "setpriv")
READY_TIMEOUT_S = 20.0
ENDING_TIMEOUT_S = 20.0
# In every host, below the place of its disk; /tmp/ray is a folder of it too.
FOLDERS = ("home", "tmp", "ray", "cache", "runs", "secrets", "logs")
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH")


class HostsFailed(RuntimeError):  # noqa: N818 - reads as what happened
    """A host or a command in it did not do what it should."""


def missing() -> list[str]:
    """What is not there that hosts need; empty where they can be made."""
    found = [f"the program {name}" for name in NEEDED if shutil.which(name) is None]
    if os.geteuid():
        found.append("root")
    if found:
        return found
    try:
        _checked(["unshare", "--net", "ip", "link", "add", "one", "type", "veth", "peer", "name", "other"])
        _checked(["unshare", "--net", "ip", "link", "add", BRIDGE, "type", "bridge"])
        _checked(["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "true"])
    except HostsFailed as error:
        found.append(f"namespaces ({error})")
    return found


class Process:
    """A program that runs in a host. Its log lies outside of it.

    Args:
        entered: the `nsenter` that waits for it.
        log: for everything it prints.
    """

    def __init__(self, entered: "subprocess.Popen[bytes]", log: Path) -> None:
        self._entered = entered
        self.log = log

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self._entered.poll() is None

    @property
    def status(self) -> int | None:
        """Its exit status, the negative number of the signal that ended it, or None while it runs."""
        return self._entered.poll()

    def wait(self, timeout_s: float) -> int:
        """Its exit status.

        Raises:
            HostsFailed: it still runs.
        """
        try:
            return self._entered.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise HostsFailed(f"still running after {timeout_s:.0f} s; {self.log}:\n{self.said[-3000:]}") from None

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the program itself."""
        for child in psutil.Process(self._entered.pid).children():
            child.send_signal(number)

    def end(self, timeout_s: float = ENDING_TIMEOUT_S) -> None:
        """Tell it to end, and kill it if it does not."""
        if not self.running:
            return
        self.send(signal.SIGTERM)
        try:
            self._entered.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            self._entered.wait(timeout_s)


class Host:
    """One host: it is made and taken away by a `Network`.

    Args:
        name: its hostname.
        address: in the network.
        disk: its folder, as it is seen from outside.
        place: where it sees its folder; the same path in every host.
        first: the process that all of it hangs on.
        port: name of the switch's end of its cable.
    """

    def __init__(
        self, name: str, address: str, disk: Path, place: Path, first: "subprocess.Popen[bytes]", port: str
    ) -> None:
        self.name, self.address, self.disk, self.place, self.port = name, address, disk, place, port
        self._first = first
        self._started = 0
        self._init = psutil.Process(first.pid).children()[0]
        self._namespace = os.readlink(f"/proc/{self._init.pid}/ns/pid")

    @property
    def pid(self) -> int:
        """Of its first process, as this process sees it."""
        return self._init.pid

    @property
    def environment(self) -> dict[str, str]:
        """What its programs inherit: nothing of this process but where programs are found."""
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        return {
            **kept,
            "HOME": str(self.place / "home"),
            "TMPDIR": str(self.place / "tmp"),
            "XDG_CACHE_HOME": str(self.place / "cache"),
            "CUDA_VISIBLE_DEVICES": "",
        }

    def start(
        self,
        command: Sequence[str | Path],
        variables: Mapping[str, str] | None = None,
        *,
        user: str = "",
        name: str = "",
    ) -> Process:
        """Start a program in it, in its folder.

        Args:
            command: program and arguments.
            variables: of the environment, beside those of every program of the host.
            user: to become, root if empty.
            name: of its log.
        """
        self._started += 1
        log = self.disk / "logs" / f"{self._started:02d}-{name or Path(str(command[0])).name}"
        with log.open("wb") as output:
            entered = subprocess.Popen(
                self._entering(command, user),
                env={**self.environment, **(variables or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Process(entered, log)

    def run(
        self,
        command: Sequence[str | Path],
        variables: Mapping[str, str] | None = None,
        *,
        user: str = "",
        timeout_s: float = 120.0,
    ) -> str:
        """Run a program in it to its end; what it says.

        Raises:
            HostsFailed: it failed, or did not end in time.
        """
        told = f"{shlex.join(map(str, command))} in {self.name}"
        try:
            done = subprocess.run(
                self._entering(command, user),
                env={**self.environment, **(variables or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise HostsFailed(f"{told} did not end within {timeout_s:.0f} s") from None
        if done.returncode:
            raise HostsFailed(f"{told} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """All that runs in it, its first process left out."""
        return [each for each in psutil.process_iter() if each.pid != self.pid and self._has(each)]

    def _has(self, process: psutil.Process) -> bool:
        try:
            return os.readlink(f"/proc/{process.pid}/ns/pid") == self._namespace
        except OSError:
            return False  # it has ended meanwhile

    def configure(self, *arguments: str) -> None:
        """`ip` in its network namespace."""
        _checked(["nsenter", f"--target={self.pid}", "--net", "ip", *arguments])

    def turn_off(self) -> None:
        """As if its power failed: every process is killed. Its files stay until the network ends."""
        if self._first.poll() is None:
            if self._first.stdin:
                self._first.stdin.close()
            self._first.wait(ENDING_TIMEOUT_S)

    def _entering(self, command: Sequence[str | Path], user: str) -> list[str]:
        """A command from outside that runs another one inside."""
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--ipc", "--pid"]
        become: list[str] = []
        if user:
            group = pwd.getpwnam(user).pw_gid
            become = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
        return [*enter, "env", f"--chdir={self.place}", *become, *map(str, command)]


class Network:
    """A switch, in a namespace of its own, and the hosts at it. Use `network()`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts: dict[str, Host] = {}
        (folder / "host").mkdir()
        (folder / "disks").mkdir()
        (folder / "resolv.conf").touch()
        self._names = folder / "hosts"
        self._names.write_text("127.0.0.1 localhost\n")
        self._switch = _first_process(["--net"], "ip link set lo up")
        pid = psutil.Process(self._switch.pid).children()[0].pid
        self._at_switch = ["nsenter", f"--target={pid}", "--net", "ip"]
        _checked([*self._at_switch, "link", "add", BRIDGE, "type", "bridge"])
        _checked([*self._at_switch, "address", "add", f"{ROUTER}/24", "dev", BRIDGE])
        _checked([*self._at_switch, "link", "set", BRIDGE, "up"])

    def add(self, name: str, *, hidden: Sequence[Path] = ()) -> Host:
        """A new host at the network. It has an address, a loopback, a hostname, processes and files of its own.

        Args:
            name: its hostname.
            hidden: folders of this machine that it sees empty.
        """
        number = len(self.hosts) + 1
        address, port = f"{SUBNET}.{number}", f"port{number}"
        disk, place = self.folder / "disks" / name, self.folder / "host"
        disk.mkdir()
        for each in FOLDERS:
            (disk / each).mkdir()
        (disk / "secrets").chmod(0o700)
        with self._names.open("a") as file:
            file.write(f"{address} {name}\n")
        Path("/tmp/ray").mkdir(mode=0o777, exist_ok=True)  # where Ray's own folder of this host is laid over
        steps = _settle(name, disk, place, self.folder, hidden)
        first = _first_process(["--net", "--uts", "--mount", "--ipc", "--pid", "--mount-proc"], steps)
        host = self.hosts[name] = Host(name, address, disk, place, first, port)
        peer = ["peer", "name", "eth0", "netns", str(host.pid)]
        _checked([*self._at_switch, "link", "add", port, "type", "veth", *peer])
        _checked([*self._at_switch, "link", "set", port, "master", BRIDGE])
        self.plug_in(host)
        host.configure("address", "add", f"{address}/24", "dev", "eth0")
        host.configure("link", "set", "eth0", "up")
        host.configure("route", "add", "default", "via", ROUTER)
        return host

    def cut_off(self, host: Host) -> None:
        """Pull a host's cable: nothing comes through any more, and nobody is told."""
        _checked([*self._at_switch, "link", "set", host.port, "down"])

    def plug_in(self, host: Host) -> None:
        """Put the cable back."""
        _checked([*self._at_switch, "link", "set", host.port, "up"])

    def close(self) -> None:
        """Turn every host off, and the switch."""
        for host in self.hosts.values():
            host.turn_off()
        if self._switch.stdin:
            self._switch.stdin.close()
        self._switch.wait(ENDING_TIMEOUT_S)


@contextmanager
def network(kept: Path | None = None) -> Iterator[Network]:
    """A network without hosts, for the length of the block.

    Args:
        kept: where everything its hosts wrote is moved at the end; removed if None.

    Raises:
        HostsFailed: this machine cannot have one.
    """
    if lacking := missing():
        raise HostsFailed(f"hosts need {', '.join(lacking)}")
    remove_leftovers()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    folder.chmod(0o755)  # some programs become another user
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = None
        try:
            found = Network(folder)
            yield found
        finally:
            if found:
                found.close()
            if kept:
                shutil.copytree(folder / "disks", kept, symlinks=True, ignore=_sockets, dirs_exist_ok=True)
            shutil.rmtree(folder)


def remove_leftovers() -> list[Path]:
    """Remove the folders of networks whose process was killed."""
    found = []
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            with (folder / "lock").open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                found.append(folder)
        except OSError:
            continue  # another process has it, or removes it
    return found


def _sockets(folder: str, names: Iterable[str]) -> list[str]:
    """Those which cannot be copied."""
    return [name for name in names if (path := Path(folder, name)).is_socket() or path.is_fifo()]


def _settle(name: str, disk: Path, place: Path, folder: Path, hidden: Iterable[Path]) -> str:
    """What a host's first process does first: its own files over everybody's, and nothing of the other hosts'."""
    steps = [
        ["hostname", name],
        ["ip", "link", "set", "lo", "up"],
        ["mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", "/dev/shm"],
        ["mount", "--bind", disk / "ray", "/tmp/ray"],
        ["mount", "--bind", folder / "hosts", "/etc/hosts"],
        ["mount", "--bind", folder / "resolv.conf", "/etc/resolv.conf"],
        ["mount", "--bind", disk, place],
        *(["mount", "-t", "tmpfs", "-o", "ro,mode=755", "tmpfs", each] for each in (folder / "disks", *hidden)),
    ]
    return "\n".join(shlex.join(map(str, step)) for step in steps)


def _first_process(kinds: Sequence[str], steps: str) -> "subprocess.Popen[bytes]":
    """A process in new namespaces that lives until its input ends, which it does with this process at the latest.

    It ignores SIGCHLD, so that orphans are not kept as zombies.

    Raises:
        HostsFailed: a step failed.
    """
    script = f"set -e\n{steps}\necho ready\ntrap '' CHLD\nexec cat >/dev/null 2>&1"
    process = subprocess.Popen(
        ["unshare", *kinds, "--fork", "--kill-child", "--", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is for this process, which turns hosts off in good order
    )
    said = process.stdout.readline() if process.stdout else b""
    if said != b"ready\n":
        rest = process.communicate(timeout=READY_TIMEOUT_S)[0] or b""
        raise HostsFailed(f"no namespaces: {(said + rest).decode(errors='replace').strip()}")
    return process


def _checked(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostsFailed(f"{shlex.join(command)}: {(done.stdout + done.stderr).strip()}")
    return done.stdout
