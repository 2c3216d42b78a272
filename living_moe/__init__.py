"""The door."""
from pathlib import Path as _Path

# A source checkout keeps the rooms beside this folder (setup.cfg's package_dir maps them under this name). Python started
# in the checkout's root finds this folder before the installed map, so the map is repeated here.
_root = _Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file() and (_root / "configuration").is_dir():
    __path__.append(str(_root))
