"""Rollout engines that live on the trainer's ranks, one replica on each group of ranks, as the driver uses them.

driver    Router ──> ClientEngine ──> RemoteBackend ─┐ (one a replica)      RankFan: one weight update for all
──────────────────────────────────────────────────── │ ─────────────────────────────── │ ────────────────────
rank                                     EngineHost <┘  ── engine process    EngineHost.send_weights, on every rank
"""
