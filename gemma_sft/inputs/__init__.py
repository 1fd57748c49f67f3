"""From files to records to audited splits."""
