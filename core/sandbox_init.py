"""The first process of a sandbox. `sandbox.py` runs this file as a script, in an interpreter of its own.

    namespaces   L launches and writes the user map │ A new user, mount, pid, network, ipc, uts namespaces; new root
                 B pid 1 of the namespace: when it ends, the kernel kills all that is left │ T the program, as nobody
    confined     the program itself, after Landlock (files), seccomp (sockets, signals, no child processes), no caps
    limits       the program itself, with resource limits only

Standard library only. The program's start is written to the status pipe ("S"), as are what goes wrong before it ("E …")
and the program's end ("X code").
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

NOBODY = 65534
NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000  # user mnt pid net ipc uts
NEW_USER, THREAD = 0x10000000, 0x00010000  # of clone
READ_ONLY, NO_SUID, NO_DEV = 1, 2, 4
BIND, REC, PRIVATE, DETACH = 4096, 16384, 1 << 18, 2
PDEATHSIG, SECUREBITS, NO_NEW_PRIVS, SECCOMP, DROP_BOUNDING = 1, 28, 38, 22, 24
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/nix/store")
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CALLS = {  # (x86_64, aarch64); None: does not exist there
    "always": {
        *((425, 425), (321, 280), (250, 219), (248, 217), (249, 218), (323, 282), (298, 241)),  # io_uring, bpf, keys, …
        *((272, 97), (308, 268), (101, 117), (165, 40)),  # unshare, setns, ptrace, mount
        *((29, 194), (68, 186), (64, 190), (240, 180), (319, 279), (447, 447)),  # memory that no process's limit counts
    },
    "confined": {
        *((62, 129), (200, 130), (234, 131), (129, 138), (297, 240), (434, 434), (424, 424)),  # signals
        *((310, 270), (311, 271), (302, 261), (440, 440), (57, None), (58, None)),  # others' memory and limits, fork
        *((141, 140), (203, 122), (142, 118), (144, 119), (314, 274), (251, 30)),  # and when they run
        (41, 198),  # sockets
        *((90, None), (91, 52), (268, 53), (452, 452), (92, None), (93, 55), (94, None), (260, 54)),  # modes, owners:
        *((132, None), (235, None), (261, None), (280, 88), (76, 45)),  # Landlock does not see them; times, truncate
        *((188, 5), (189, 6), (190, 7), (197, 14), (198, 15), (199, 16), (463, 463), (466, 466)),  # attributes
    },
}
REFUSED = (  # where `confined`, by an argument's value: (call, which argument, its values)
    ((72, 25), 1, (8, 15)),  # fcntl: whom a pipe's data signals
    ((16, 29), 1, (0x8901, 0x8902)),  # ioctl: the same
    ((53, 199), 1, tuple(kind | flags for kind in (2, 3) for flags in (0, 0x800, 0x80000, 0x80800))),  # datagrams
)
SOCKET, CLONE, CLONE3 = (41, 198), (56, 220), (435, 435)

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    text = [None if s is None else s.encode() for s in (source, target, kind)]
    checked(libc.mount(*text, ctypes.c_ulong(flags), data and data.encode()), f"mount {target}")


def set_attributes(path: str, attributes: int, recursive: int = 0) -> None:
    """mount_setattr(2)."""
    value = struct.pack("QQQQ", attributes, 0, 0, 0)
    checked(libc.syscall(442, -100, path.encode(), recursive, value, len(value)), f"mount_setattr {path}")


def new_root(spec: dict) -> None:
    """A root of its own: the system's programs and Python's, read-only; four devices; a scratch folder in memory."""
    root = spec["root"]
    mount(None, "/", None, REC | PRIVATE)
    mount("tmpfs", root, "tmpfs", NO_SUID | NO_DEV, "size=1m,mode=755")
    for path in dict.fromkeys((*SYSTEM, spec["prefix"], *DEVICES)):
        inside = root + path
        if not os.path.exists(path) or os.path.exists(inside):
            continue
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path):  # /lib → usr/lib
            os.symlink(os.readlink(path), inside)
            continue
        os.mkdir(inside) if os.path.isdir(path) else os.close(os.open(inside, os.O_CREAT))
        mount(path, inside, None, BIND | REC)
        set_attributes(inside, READ_ONLY | NO_SUID | (0 if path in DEVICES else NO_DEV), recursive=0x8000)
    os.mkdir(root + "/scratch")
    mount("tmpfs", root + "/scratch", "tmpfs", NO_SUID | NO_DEV, f"size={spec['disk']},nr_inodes=10000,mode=1777")
    write_files(spec, root + "/scratch")
    os.chdir(root)
    checked(libc.pivot_root(b".", b"."), "pivot_root")
    checked(libc.umount2(b".", DETACH), "umount the old root")
    set_attributes("/", READ_ONLY)
    os.chdir("/scratch")


def write_files(spec: dict, folder: str) -> None:
    for name, text in spec["files"].items():
        with open(os.path.join(folder, name), "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)


def die_with_parent() -> None:
    checked(libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def limit(spec: dict, processes: bool) -> None:
    cpu = int(spec["seconds"]) + 1
    limits = {"CPU": cpu, "AS": spec["memory"], "FSIZE": spec["disk"], "CORE": 0, "NOFILE": 64}
    if processes:  # counted within the user namespace: elsewhere, all of the user's processes would count
        limits["NPROC"] = spec["processes"]
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


def filter_calls(confined: bool) -> None:
    """A seccomp filter: no sockets but AF_UNIX, no namespaces; where `confined` no socket at all, no signals, no forks,
    and nothing that Landlock does not see: it governs what is opened, made and removed, not modes, owners, times."""
    machine = platform.machine()
    if machine not in AUDIT:
        raise OSError(f"no table of system calls for {machine}")
    which = ("x86_64", "aarch64").index(machine)
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    deny, no_such = 0x00050000 | 1, 0x00050000 | 38
    rows = [(load, 0, 0, 4), (equal, 1, 0, AUDIT[machine]), (give, 0, 0, 0x80000000), (load, 0, 0, 0)]
    rows += [(at_least, 0, 1, 0x40000000), (give, 0, 0, deny)]  # x32
    calls = CALLS["always"] | (CALLS["confined"] if confined else set())
    for number in sorted(call[which] for call in calls if call[which]):
        rows += [(equal, 0, 1, number), (give, 0, 0, deny)]
    for call, argument, values in REFUSED if confined else ():
        refused = [row for value in values for row in ((equal, 0, 1, value), (give, 0, 0, deny))]
        rows += [(equal, 0, len(refused) + 2, call[which]), (load, 0, 0, 16 + 8 * argument), *refused, (load, 0, 0, 0)]
    rows += [(equal, 0, 1, CLONE3[which]), (give, 0, 0, no_such)]  # flags out of sight: libc falls back on clone
    rows += [(equal, 0, 4, SOCKET[which]), (load, 0, 0, 16), (equal, 1, 0, 1), (give, 0, 0, deny), (load, 0, 0, 0)]
    allowed = (any_bit, 1, 0, THREAD) if confined else (any_bit, 0, 1, NEW_USER)
    rows += [(equal, 0, 4, CLONE[which]), (load, 0, 0, 16), allowed, (give, 0, 0, deny), (load, 0, 0, 0)]
    rows += [(give, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in rows))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rows), ctypes.addressof(program)))
    checked(libc.prctl(SECCOMP, 2, header, 0, 0), "seccomp")


def landlock(spec: dict) -> None:
    """Reading of the system's programs and Python's, everything in the scratch folder, nothing else."""
    version = checked(libc.syscall(444, None, 0, 1), "landlock")
    every = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    ruleset = checked(libc.syscall(444, struct.pack("Q", every), 8, 0), "landlock")
    rules = {path: 0b1101 for path in (*SYSTEM, spec["prefix"])} | dict.fromkeys(DEVICES, 0b110)
    for path, access in (rules | {spec["root"]: every}).items():
        if os.path.exists(path):
            access &= every if os.path.isdir(path) else 0b111  # the other rights are those of folders
            place = os.open(path, os.O_PATH)
            checked(libc.syscall(445, ruleset, 1, struct.pack("=Qi", access, place), 0), f"landlock {path}")
            os.close(place)
    checked(libc.syscall(446, ruleset, 0), "landlock")


def no_capabilities() -> None:
    """Also after exec, where root would get them back."""
    for number in range(64):
        libc.prctl(DROP_BOUNDING, number, 0, 0, 0)
    libc.prctl(SECUREBITS, 0b11, 0, 0, 0)
    libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))


def execute(spec: dict) -> None:
    home = {"HOME": os.getcwd(), "TMPDIR": os.getcwd(), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    os.write(int(sys.argv[1]), b"S")
    os.execve(spec["argv"][0], spec["argv"], home)


def confined(spec: dict) -> None:
    if spec["level"] == "confined":
        checked(libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
        landlock(spec)
        filter_calls(confined=True)
        no_capabilities()
    execute(spec)


def namespaces(spec: dict, status: int) -> int:
    """L: returns when the program has ended, with its exit code."""
    ready, mapped = os.pipe(), os.pipe()
    child = os.fork()
    if child:
        if os.read(ready[0], 1):
            write_maps(child)
            os.write(mapped[1], b".")
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    die_with_parent()
    checked(libc.unshare(NAMESPACES), "unshare")
    os.write(ready[1], b".")
    os.read(mapped[0], 1)
    die_with_parent()  # changed credentials have cleared it
    new_root(spec)
    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
    die_with_parent()
    child = os.fork()
    if not child:
        os.setsid()
        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        checked(libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
        limit(spec, processes=True)
        filter_calls(confined=False)
        execute(spec)
    while True:
        ended, how = os.wait()  # orphans too: they are pid 1's
        if ended == child:
            os.write(status, f"X {os.waitstatus_to_exitcode(how)}".encode())
            os._exit(0)


def write_maps(child: int) -> None:
    """Who the namespace's users are outside. Root keeps itself, to mount, and nobody, to run the program."""
    user, group = os.geteuid(), os.getegid()
    try:
        for name in ("uid_map", "gid_map"):
            write(f"/proc/{child}/{name}", f"0 0 1\n{NOBODY} {NOBODY} 1" if user == 0 else "")
    except OSError:
        write(f"/proc/{child}/setgroups", "deny")
        write(f"/proc/{child}/uid_map", f"{NOBODY} {user} 1")
        write(f"/proc/{child}/gid_map", f"{NOBODY} {group} 1")


def write(path: str, text: str) -> None:
    if not text:
        raise OSError("not root")
    with open(path, "w") as file:
        file.write(text)


def main() -> None:
    spec, status = json.loads(sys.stdin.buffer.readline()), int(sys.argv[1])
    os.set_inheritable(status, False)
    os.dup2(int(sys.argv[2]), 0)
    os.close(int(sys.argv[2]))
    try:
        if spec["level"] == "namespaces":
            die_with_parent()
            namespaces(spec, status)
        else:
            write_files(spec, spec["root"])
            os.chdir(spec["root"])
            limit(spec, processes=False)
            confined(spec)
    except Exception as error:
        os.write(status, f"E {error}".encode())
        os._exit(1)


if __name__ == "__main__":
    main()
