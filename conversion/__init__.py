"""The conversion room: pretrained checkpoints in, living models out."""

from living_moe.conversion.convert import Verification, convert, graft

__all__ = ["Verification", "convert", "graft"]
