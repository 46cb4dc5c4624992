"""Measures time and memory of whole commands against a bare `import timm`, in alternation.

    python benchmarks/startup.py [--rounds 5]

The result is the fastest round: on a shared machine, slower rounds measure the load of other programs.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time

SDCLI = [sys.executable, "-m", "sdcli"]
COMMANDS = {
    "import timm": [sys.executable, "-c", "import timm"],
    "sdcli --help": [*SDCLI, "--help"],
    "sdcli recipes list": [*SDCLI, "recipes", "list"],
    "sdcli inspect resnet18": [*SDCLI, "inspect", "resnet18"],
    "sdcli inspect resnet101": [*SDCLI, "inspect", "resnet101"],
    "sdcli inspect vit_giant_patch14_clip_224": [*SDCLI, "inspect", "vit_giant_patch14_clip_224"],  # 1.0 G parameters
    "sdcli inspect vit_7b_patch16_dinov3": [*SDCLI, "inspect", "vit_7b_patch16_dinov3"],  # 6.7 G
}


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and peak memory (MiB) of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    assert status == 0, command
    # macOS reports bytes, Linux KiB.
    return seconds, usage.ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    least = dict.fromkeys(COMMANDS, (float("inf"), 0.0))
    for _ in range(options.rounds):
        for name, command in COMMANDS.items():
            least[name] = min(least[name], run(command))
    base = least["import timm"][0]
    print(f"{'command':42} {'seconds':>8} {'x import timm':>14} {'peak MiB':>9}")
    for name, (seconds, memory) in least.items():
        print(f"{name:42} {seconds:8.2f} {seconds / base:14.2f} {memory:9.0f}")
    print(json.dumps({name: {"seconds": round(s, 3), "peak_mib": round(m)} for name, (s, m) in least.items()}))


if __name__ == "__main__":
    main()
