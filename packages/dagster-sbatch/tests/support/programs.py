"""Programs that are not Python, for tests here and on the simulated site."""

import os
import shutil
from pathlib import Path

PICTURE = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360f8cf50000003860180"
    "5a343d6b0000000049454e44ae426082"
)
"""A PNG of one pixel."""

REPORTS = """\
#!/bin/bash
set -eu
echo "arguments: $*"
pipes log --level warning "half of" "it"
pipes materialize --metadata rows=12 --metadata share=0.5 --metadata where:text=0123 --metadata plot=@"$1" \\
  --metadata node="$(uname -n)"
pipes check fine --passed --metadata left=0
pipes extra trials
"""
"""Reports by all commands; its first argument is a picture."""


def make(folder: Path, text: str, name: str = "model.sh") -> Path:
    """An executable script."""
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def foreign_elf() -> bytes:
    """The beginning of a program for another CPU than this one."""
    head = bytearray(Path(str(shutil.which("true"))).read_bytes()[:4096])
    head[18:20] = (0xB7 if os.uname().machine != "aarch64" else 0x3E).to_bytes(2, "little")
    return bytes(head)
