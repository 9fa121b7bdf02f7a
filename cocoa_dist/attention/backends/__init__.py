"""One module for each way to run a plan.

Each has `missing(device, dtype)`: None, or why it cannot run here and what would change that; and
`run(q_THK, k_TGK, v_TGK, plan, scale)`: the attention output (T, H, K).
"""
