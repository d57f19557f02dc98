"""The operator: watch event -> observe -> decide -> execute. DESIGN: functional core (subject, desired, observed, decide), thin shell (cluster, events)."""
