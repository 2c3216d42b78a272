"""living_moe: mixture-of-experts layers as living populations.

Importing it registers `living_moe` models with Transformers' `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`.
"""

from pathlib import Path as _Path

# A source checkout keeps the rooms beside this folder (setup.cfg's package_dir maps them under this name). Python
# started in the checkout's root finds this folder before the installed map, so the map is repeated here.
_root = _Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file() and (_root / "configuration").is_dir():
    __path__.append(str(_root))

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402

from living_moe.configuration import PRESETS, LivingMoeConfig, LivingMoeError  # noqa: E402
from living_moe.conversion import convert, export  # noqa: E402
from living_moe.modeling_living_moe import LifecycleEvent, LivingMoeForCausalLM, LivingMoeModel  # noqa: E402
from living_moe.modeling_living_moe.active_experts import register_active_experts  # noqa: E402
from living_moe.modeling_living_moe.block import LivingMoeBlock  # noqa: E402
from living_moe.modeling_living_moe.checkpoint import set_card_writer  # noqa: E402
from living_moe.modeling_living_moe.lifecycle.surgery import set_optimizer_surgeon  # noqa: E402
from living_moe.modeling_living_moe.standalone import StandaloneLivingMoe  # noqa: E402
from living_moe.modeling_living_moe.synapse.attention import (  # noqa: E402
    attach_attention_synapses,
    register_synaptic_attention,
)
from living_moe.records import write_card  # noqa: E402
from living_moe.training.grafting import set_grafter  # noqa: E402
from living_moe.training.optimizer_surgery import stage_optimizer_edit  # noqa: E402
from living_moe.version import __version__  # noqa: E402

AutoConfig.register("living_moe", LivingMoeConfig, exist_ok=True)
AutoModel.register(LivingMoeConfig, LivingMoeModel, exist_ok=True)
AutoModelForCausalLM.register(LivingMoeConfig, LivingMoeForCausalLM, exist_ok=True)
set_optimizer_surgeon(stage_optimizer_edit)
register_active_experts()
register_synaptic_attention()
set_card_writer(write_card)
set_grafter(convert)

__all__ = [
    "PRESETS",
    "LifecycleEvent",
    "LivingMoeBlock",
    "LivingMoeConfig",
    "LivingMoeError",
    "LivingMoeForCausalLM",
    "LivingMoeModel",
    "StandaloneLivingMoe",
    "__version__",
    "attach_attention_synapses",
    "convert",
    "export",
]
