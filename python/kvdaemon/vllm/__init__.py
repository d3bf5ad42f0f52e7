"""kvd's connector for vLLM (0.30 or newer): ``kv_connector_module_path: "kvdaemon.vllm"``, class ``KvdConnector``.

Minimal ``--kv-transfer-config``::

    {"kv_connector": "KvdConnector", "kv_connector_module_path": "kvdaemon.vllm", "kv_role": "kv_both",
     "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"socket": "/run/kvd/default/kvd.sock"}}

Without ``"kv_load_failure_policy": "recompute"`` a block that can't be loaded ends its request with an error, because that
is vLLM's default.
"""

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from kvdaemon.vllm.connector import KvdConnector

try:
    # A MultiConnector looks up the class of its children's stats by name alone.
    KVConnectorFactory.register_connector("KvdConnector", "kvdaemon.vllm", "KvdConnector")
except ValueError:  # there already
    pass

__all__ = ["KvdConnector"]
