"""What the host keeps of its sessions and approvals, and how its operators get at it."""
