"""The network of a site: a free subnet, and the bridge that joins its machines."""

import json
import zlib

from .errors import SiteError
from .host import ip, locked
from .layout import Layout, state_base, state_folder

_SUBNETS = 256


def find(name: str) -> Layout | None:
    """Return the layout of the site of that name, or None if it is not there."""
    file = state_folder(name) / "site.json"
    if not file.exists():
        return None
    about = json.loads(file.read_text(encoding="utf-8"))
    return Layout(name, about["subnet"], about.get("slurm", "22.05"))  # a site of an earlier version does not say


def claim(name: str, slurm: str) -> Layout:
    """Return the layout of the site of that name; a new one gets a free subnet, its bridge and that version of Slurm.

    Raises:
        SiteError: every subnet is taken.
    """
    with locked(state_base() / "lock"):
        layout = find(name) or Layout(name, _free_subnet(name), slurm)
        layout.state.mkdir(exist_ok=True)
        about = {"subnet": layout.subnet, "slurm": layout.slurm}
        (layout.state / "site.json").write_text(json.dumps(about), encoding="utf-8")
        if not _exists(layout.bridge):
            ip("link", "add", layout.bridge, "type", "bridge")
            ip("address", "add", f"{layout.address(1)}/24", "dev", layout.bridge)
        ip("link", "set", layout.bridge, "up")
        return layout


def release(layout: Layout) -> None:
    """Remove the bridge."""
    if _exists(layout.bridge):
        ip("link", "delete", layout.bridge)


def _free_subnet(name: str) -> int:
    """Return a subnet without an interface or route of this machine; the same for a name if it is free."""
    taken = (
        json.loads(ip("-json", "-4", "address", "show")),
        json.loads(ip("-json", "-4", "route", "show", "table", "all")),
    )
    addresses = {entry["local"] for interface in taken[0] for entry in interface.get("addr_info", ())}
    addresses |= {str(route.get("dst", "")) for route in taken[1]}
    first = zlib.crc32(name.encode()) % _SUBNETS
    for i in range(_SUBNETS):
        subnet = (first + i) % _SUBNETS
        if not any(address.startswith(f"10.77.{subnet}.") for address in addresses):
            return subnet
    raise SiteError("every subnet of 10.77.0.0/16 is in use")


def _exists(interface: str) -> bool:
    return any(entry.get("ifname") == interface for entry in json.loads(ip("-json", "link", "show")))
