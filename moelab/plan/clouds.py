"""What the clouds call their machines with a GPU, who says so, and what an hour costs there where that is known."""

from __future__ import annotations

import dataclasses

from moelab.plan import prices
from moelab.plan.figures import Figure, Source

BASIS = {"AWS": "aws", "Azure": "azure", "Google Cloud": "google"}


@dataclasses.dataclass(frozen=True)
class Instance:
    """One kind of machine.

    Attributes:
      cloud, name, gpu: who, what, which GPU.
      source: of the statement that the cloud has it.
    """

    cloud: str
    name: str
    gpu: str
    source: Source

    @property
    def verified(self) -> bool:
        """Whether a source was read that says so."""
        return self.source.status != "unverified"

    @property
    def price(self) -> Figure | None:
        """What this cloud asks for an hour of one GPU; None: not known here."""
        return prices.PRICES.get(self.gpu, {}).get(BASIS[self.cloud])


_READ = "2026-11-29"
_MEMORY = Source("moelab fact sheet on hardware, from memory", "2026-11", "unverified")
_BLOCKS = Source("docs.aws.amazon.com, EC2 user guide, how Capacity Blocks work", _READ)
_ND = Source("MicrosoftDocs/azure-docs, sizes of the ND family", "2024-06-06")
_AKS = Source("microsoft/aspire, AksNodeVmSizes.cs: Standard_ND128isr_GB300_v6", _READ)
_GOOGLE = Source("docs.cloud.google.com, accelerator-optimized machine family", _READ)
INSTANCES = (
    Instance("AWS", "p5", "h100", _BLOCKS),
    Instance("AWS", "p5e and p5en", "h200", _BLOCKS),
    Instance("AWS", "p6-b200", "b200", _BLOCKS),
    Instance("AWS", "p6-b300", "b300", _MEMORY),
    Instance("AWS", "P6e-GB200 UltraServer", "gb200", _BLOCKS),
    Instance("Azure", "ND H100 v5", "h100", _ND),
    Instance("Azure", "ND H200 v5", "h200", _MEMORY),
    Instance(
        *("Azure", "ND GB200 v6", "gb200"),
        Source("learn.microsoft.com, ND-GB200-v6 series: 18 machines of 4 GPUs to a rack", _READ),
    ),
    Instance("Azure", "ND GB300 v6", "gb300", _AKS),
    Instance("Google Cloud", "A3 High and Mega", "h100", _GOOGLE),
    Instance(
        *("Google Cloud", "A3 Ultra", "h200"),
        Source("GoogleCloudPlatform/cluster-toolkit, release 1.44.1", "2024-12-30"),
    ),
    Instance(
        *("Google Cloud", "A4", "b200"),
        Source("dstackai/dstack, pull request 3100: B200 of A4", "2025-09-14", "third party"),
    ),
    Instance(
        *("Google Cloud", "A4X", "gb200"),
        Source("insights.marvin-42.com, quoting Google's documents", "2026-04-19", "third party"),
    ),
    Instance(
        *("Google Cloud", "A4X Max", "gb300"),
        Source("insights.marvin-42.com, quoting Google's documents", "2026-04-19", "third party"),
    ),
)
