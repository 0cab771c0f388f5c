"""Experiments: many runs that a YAML file describes, and the tables, statistics and figures that are made of them.

- :mod:`~editlab.experiments.spec`: the schema of ``configs/experiments/*.yaml``
- :mod:`~editlab.experiments.plan`: from an experiment to its runs
- :mod:`~editlab.experiments.launch`: starts runs on this machine or on a Ray cluster
- :mod:`~editlab.experiments.sweep`: ``editlab sweep``, from the first run to the last figure
- :mod:`~editlab.experiments.tables`, :mod:`~editlab.experiments.statistics`, :mod:`~editlab.experiments.drawing`:
  what is made of finished runs
- :mod:`~editlab.experiments.reference`: the plain, slow way of editing, an oracle for tests and benchmarks
"""
