"""Plans compared before training: drawn requests, costs, pictures. The command line alone imports it."""
