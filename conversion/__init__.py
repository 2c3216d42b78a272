"""The conversion room: pretrained checkpoints in, living models out, and uniform ones back."""

from living_moe.conversion.convert import Verification, convert, graft
from living_moe.conversion.export import export

__all__ = ["Verification", "convert", "export", "graft"]
