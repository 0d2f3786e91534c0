"""accelerate with FSDP2 on CPUs.

AcceleratorState takes an FSDP plugin for GPUs, NPUs and the like alone: on CPUs (MULTI_CPU) it drops it without a word, and DDP
is what one gets. All behind that, `prepare` above all, works on CPUs too; so the state is told here that it has the plugin.
"""

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def allow_fsdp() -> None:
    """Let AcceleratorState keep an FSDP plugin on CPUs, in this process from now on."""
    original = AcceleratorState.__init__

    def init(self, *arguments, fsdp_plugin=None, **options):
        original(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as AcceleratorState does itself on GPUs

    AcceleratorState.__init__ = init
