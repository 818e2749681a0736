"""A model entered at a layer: what an activation cache keeps, and rows that carry marks."""
