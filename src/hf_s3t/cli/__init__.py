"""`hf-s3t`: thin verbs over the rooms below."""
