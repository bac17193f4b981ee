"""What a served model is asked, and how its answers and logits are judged.
May import: weights and what lies below it; not making, not proof.
"""
