"""From files to typed batches. This room and ``models`` never import each other."""
