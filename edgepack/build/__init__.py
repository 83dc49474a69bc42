"""From a project to bundles: inputs -> planner -> execute -> judging -> packing, driven by search."""
