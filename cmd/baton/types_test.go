package main

import (
	"encoding/json"

	"github.com/coreos/go-systemd/v22/journal"
)

type (
	jsonRaw         = json.RawMessage
	journalPriority = journal.Priority
)
