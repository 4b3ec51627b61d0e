"""Comparing norms: grids of trainings, what each writes down, and the report over seeds."""
