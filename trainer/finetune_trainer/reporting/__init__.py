"""How a run speaks: to a terminal or a log, to the operator, to the kubelet, and in report.json."""
