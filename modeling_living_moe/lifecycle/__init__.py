"""How populations change: events, policies, planner, surgery, lineage."""
