"""Networks that users bring, from their packages, and what becomes of them.

``python -m bench.zoo`` measures, ``docs/zoo.md`` shows it. The networks stand in
``bench/zoo/networks/``, one file per package; :data:`bench.zoo.networks.NETWORKS` has them all.
"""
