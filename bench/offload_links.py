"""The links between memory tiers: what the calibration finds in a second, beside large copies over each link.

python bench/offload_links.py [--folder /tmp]
"""

import argparse
import tempfile
import time
from dataclasses import asdict

import torch
from offload_stack import best_rate

import record  # isort: skip
from vbcompile.runtime_host import HostMemory
from vbcompile.vgpu_calibration import calibrate
from vbcompile.vgpu_size import MIB

_LARGE = 1024 * MIB


def large_copies(device: str) -> dict[str, float]:
    """Bytes per second of copies of a gibibyte."""
    (host,) = HostMemory(torch.device(device)).allocate([_LARGE])
    card = torch.empty(_LARGE, dtype=torch.uint8, device=device)
    found = {
        "h2d": best_rate(lambda: card.copy_(host, non_blocking=True), _LARGE),
        "d2h": best_rate(lambda: host.copy_(card, non_blocking=True), _LARGE),
    }
    for other in range(torch.accelerator.device_count()):
        name = f"{torch.device(device).type}:{other}"
        if name != device:
            far = torch.empty(_LARGE, dtype=torch.uint8, device=name)
            found[name] = best_rate(lambda far=far: card.copy_(far, non_blocking=True), _LARGE)  # type: ignore[misc]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", default=tempfile.gettempdir())
    options = parser.parse_args()
    device = f"{torch.accelerator.current_accelerator()}:{torch.accelerator.current_device_index()}"
    large = large_copies(device)
    begin = time.perf_counter()
    peers = [name for name in large if name not in ("h2d", "d2h")]
    found = asdict(calibrate(device, path=options.folder, peers=peers))
    seconds = time.perf_counter() - begin
    quick = {name: found[name] for name in ("h2d", "d2h")} | found["peers"]
    rows = [
        {"link": name, "large_gbps": rate / 1e9, "calibrated_gbps": quick[name] / 1e9, "ratio": quick[name] / rate}
        for name, rate in large.items()
    ]
    rows.append({"link": "all of the calibration", "seconds": seconds} | found)
    for row in rows:
        print(row, flush=True)
    record.write("offload_links", rows)


if __name__ == "__main__":
    main()
