"""The CUDA libraries that the installed ONNX Runtime wants, and where they are.

What is wanted is read from the runtime's own library of its CUDA provider, so it holds for NVIDIA's builds as well as
for PyPI's. Where they are is looked up in the order in which a process comes by them: NVIDIA's wheels beside the
runtime, an installed torch, what the system's loader knows, and CUDA folders that the loader was not told of. Nothing
is imported or loaded; all is below a root folder, as in `device`.
"""

from __future__ import annotations

import os
import re
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelocal.machine.device import ROOT, read_text
from edgelocal.machine.elf import GpuCode, gpu_code, linked_libraries

PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
DRIVER = "libcuda.so.1"
CUDNN = "libcudnn.so.9"
WHEELS, TORCH, SYSTEM, UNKNOWN_TO_LOADER = "NVIDIA's wheels", "torch", "system", "CUDA folder"

# What the provider loads when it first needs it, so that it is not linked with it: cuDNN for convolutions, the others
# for operators that no step graph has. Their numbers are not CUDA's.
_CUFFT = {12: "libcufft.so.11", 13: "libcufft.so.12"}
_CUDA = re.compile(r"lib(cuda|cudart|cublas|cublasLt|cudnn|cufft|curand|nvrtc)\.so\.[0-9.]+")
_VERSION = re.compile(r"""^cuda_version\s*=\s*["']([0-9]{1,3})""", re.MULTILINE)
_STANDARD = ("usr/lib/{}-linux-gnu", "lib/{}-linux-gnu", "usr/lib64", "lib64", "usr/lib", "lib", "usr/lib/wsl/lib")
_JETSON = ("usr/lib/{}-linux-gnu/nvidia", "usr/lib/{}-linux-gnu/tegra")
_CUDART = re.compile(r"libcudart\.so\.([0-9]{1,3})(?:\.|$)")  # libcudart.so.11.0
_LARGEST_CACHE = 1 << 24  # bytes
_CACHE_MAGIC = b"glibc-ld.so.cache1.1"
_CACHE_HEADER_BYTES, _CACHE_ENTRY_BYTES = 48, 24


@dataclass(frozen=True)
class Library:
    """A library by the name that the loader goes by. `places`: source and file, the first is the one to be used;
    without any it is missing. `needed`: edgelocal cannot train without it."""

    name: str
    needed: bool
    places: tuple[tuple[str, str], ...] = ()

    @property
    def source(self) -> str | None:
        """Where the first comes from; None where there is none."""
        return self.places[0][0] if self.places else None


@dataclass(frozen=True)
class CudaSetup:
    """`provider`: the runtime that is installed has the CUDA provider, made for version `major` of CUDA (None: not
    told), with `code` for these GPUs (None: cannot be read)."""

    provider: bool = False
    major: int | None = None
    code: GpuCode | None = None
    libraries: tuple[Library, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """The names of those that are needed and were not found."""
        return tuple(library.name for library in self.libraries if library.needed and not library.places)


def read_cuda(
    root: Path = ROOT,
    packages: Iterable[str] = sys.path,
    machine: str = "x86_64",
    environment: Mapping[str, str] = os.environ,
) -> CudaSetup:
    """What the runtime found first in the folders `packages` wants of CUDA, and what of it is on this machine."""
    folders = [Path(folder) for folder in dict.fromkeys(packages) if folder]
    home = next((folder for folder in folders if _is_folder(folder / "onnxruntime/capi")), None)
    if home is None or not _is_file(home / PROVIDER):
        return CudaSetup()
    linked, code = _look_into(home / PROVIDER)
    major = _major(linked, read_text(home / "onnxruntime/capi/build_and_package_info.py") or "")
    places = _places(root, home, folders, machine, environment)
    wanted = _wanted(linked, major)
    found = [Library(name, needed, tuple(_found(name, places))) for name, needed in wanted]
    return CudaSetup(True, major, code, tuple(found))


def preload_folders(libraries: Sequence[Library]) -> dict[str, tuple[str, ...]]:
    """For "cuda" and "cudnn" the folders for the runtime's `preload_dlls`, in turn: "" means NVIDIA's wheels and then
    the system's loader. Others are taken where they have all that is needed, one of them before several, and PyTorch's
    before the system's."""
    needed = [library for library in libraries if library.needed and library.name != DRIVER]
    cudnn = [library for library in needed if library.name.startswith("libcudnn.")]
    return {"cuda": _folders([x for x in needed if x not in cudnn]), "cudnn": _folders(cudnn)}


def _folders(libraries: Sequence[Library]) -> tuple[str, ...]:
    known = {source for source in (WHEELS, SYSTEM) if all(source in dict(x.places) for x in libraries)}
    others = [
        {str(Path(path).parent): source for source, path in x.places if source not in (WHEELS, SYSTEM)}
        for x in libraries
    ]
    common = [folder for folder in others[0] if all(folder in other for other in others)] if others else []
    of_torch = [folder for folder in common if others[0][folder] == TORCH]
    if WHEELS in known or (SYSTEM in known and not of_torch):
        return ("",)
    if common:
        return ((of_torch or common)[0],)
    if all(library.places for library in libraries):  # each library of NVIDIA's has a folder of its own up to CUDA 12
        return tuple(dict.fromkeys(next(iter(other), "") for other in others)) or ("",)
    return ("",)


def _look_into(provider: Path) -> tuple[tuple[str, ...], GpuCode | None]:
    try:
        linked = linked_libraries(provider)
        return tuple(name for name in linked if _CUDA.fullmatch(name)), gpu_code(provider)
    except (OSError, ValueError):
        return (), None


def _major(linked: Iterable[str], build_info: str) -> int | None:
    """Of CUDA, from the runtime library of CUDA that the provider is linked with, or what its build wrote down."""
    for name in linked:
        if match := _CUDART.match(name):
            return int(match[1])
    written = _VERSION.search(build_info)
    return int(written[1]) if written else None


def _wanted(linked: Sequence[str], major: int | None) -> list[tuple[str, bool]]:
    """Names, and whether training needs them. Of a provider that cannot be read the usual ones."""
    usual = [] if major is None else [f"lib{name}.so.{major}" for name in ("cublasLt", "cublas", "cudart")]
    names = dict.fromkeys(linked or [*usual, "libcurand.so.10", DRIVER], True)
    if not any(name.startswith("libcudnn.") for name in names):
        names[CUDNN] = True
    if major is not None:
        for name in (_CUFFT.get(major), f"libnvrtc.so.{major}"):
            if name is not None:
                names.setdefault(name, False)
    return list(names.items())


def _places(
    root: Path, home: Path, folders: Iterable[Path], machine: str, environment: Mapping[str, str]
) -> list[tuple[str, Path | Mapping[str, Path]]]:
    """Source, and a folder or a table of files, in the order in which they count."""
    wheels = [(WHEELS, folder) for folder in sorted((home / "nvidia").glob("*/lib"))]
    of_torch: list[tuple[str, Path]] = []
    for folder in folders:
        if _is_folder(folder / "torch"):
            of_torch.append((TORCH, folder / "torch/lib"))
            if folder != home:
                of_torch += [(TORCH, own) for own in sorted((folder / "nvidia").glob("*/lib"))]
    told = [text for text in environment.get("LD_LIBRARY_PATH", "").split(":") if text]
    loader = [(SYSTEM, root / text.lstrip("/")) for text in told]
    standard = [(SYSTEM, root / text.format(machine)) for text in _STANDARD]
    hidden = [root / text.format(machine) for text in _JETSON]
    hidden += sorted((root / "usr/local").glob("cuda*/lib64"), reverse=True)
    hidden += sorted((root / "usr/local").glob("cuda*/targets/*/lib"), reverse=True)
    cache = (SYSTEM, loader_cache(root))
    return [*wheels, *of_torch, *loader, cache, *standard, *((UNKNOWN_TO_LOADER, folder) for folder in hidden)]


def _found(name: str, places: Iterable[tuple[str, Path | Mapping[str, Path]]]) -> Iterator[tuple[str, str]]:
    seen: set[Path] = set()
    for source, place in places:
        path = place / name if isinstance(place, Path) else place.get(name)
        if path is not None and path not in seen and _is_file(path):
            seen.add(path)
            yield source, str(path)


def loader_cache(root: Path = ROOT) -> dict[str, Path]:
    """Names -> files of `/etc/ld.so.cache`, as `ldconfig -p` prints them; empty where it is absent or of another form.

    The form is glibc's since 2.2: a header of 48 bytes, entries of 24 (flags, and where name and path begin), texts.
    """
    try:
        with (root / "etc/ld.so.cache").open("rb") as file:
            data = file.read(_LARGEST_CACHE)
    except OSError:
        return {}
    start = data.find(_CACHE_MAGIC)
    if start < 0 or len(data) < start + _CACHE_HEADER_BYTES:
        return {}
    data = data[start:]
    [count] = struct.unpack_from("<I", data, len(_CACHE_MAGIC))
    found: dict[str, Path] = {}
    for at in range(_CACHE_HEADER_BYTES, _CACHE_HEADER_BYTES + count * _CACHE_ENTRY_BYTES, _CACHE_ENTRY_BYTES):
        if at + _CACHE_ENTRY_BYTES > len(data):
            break
        name, path = (_text(data, where) for where in struct.unpack_from("<II", data, at + 4))
        if "i386" not in path:  # the driver has a library of this name for 32-bit programs
            found.setdefault(name, root / path.lstrip("/"))
    return found


def _is_file(path: Path) -> bool:
    """False also where the system does not let us look."""
    try:
        return path.is_file()
    except OSError:
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _text(data: bytes, at: int) -> str:
    end = data.find(b"\0", at)
    return data[at : end if end >= 0 else None].decode("utf-8", "replace")
