"""How a run speaks while it goes: to a terminal or a log, to the operator, to the kubelet."""
