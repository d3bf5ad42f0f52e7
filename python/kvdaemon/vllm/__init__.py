"""kvd's connector for vLLM (0.30 or newer): ``kv_connector_module_path: "kvdaemon.vllm"``, class ``KvdConnector``.

Minimal ``--kv-transfer-config``::

    {"kv_connector": "KvdConnector", "kv_connector_module_path": "kvdaemon.vllm", "kv_role": "kv_both",
     "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"socket": "/run/kvd/default/kvd.sock"}}

Without ``"kv_load_failure_policy": "recompute"`` a block that can't be loaded ends its request with an error, because that
is vLLM's default.

With a vLLM that lacks what the connector hangs on, the engine runs as if kvd were not there, and its log says why in one line.
"""

from kvdaemon.vllm.entry import choose, name_to_vllm

KvdConnector = choose()
name_to_vllm()

__all__ = ["KvdConnector"]
