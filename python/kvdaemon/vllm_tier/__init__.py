"""kvd below vLLM's own CPU tier (0.31 or newer): class ``KvdSecondaryTier``, for those who keep ``TieringOffloadingSpec``.

``--kv-transfer-config``::

    {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": {
        "spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 8589934592,
        "secondary_tiers": [{"type": "KvdSecondaryTier", "module_path": "kvdaemon.vllm_tier",
                             "socket": "/run/kvd/default/kvd.sock"}]}}

What it stores are the rows of vLLM's CPU tier, in vLLM's own layout. They are never mixed with the blocks of
:class:`kvdaemon.vllm.KvdConnector`, which any parallel degree can read.
"""

from kvdaemon.vllm_tier.tier import KvdSecondaryTier

__all__ = ["KvdSecondaryTier"]
