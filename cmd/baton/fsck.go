package main

import "github.com/spf13/cobra"

// fsckCmd makes the fsck command; nil leaves it out.
var fsckCmd func(*app) *cobra.Command
