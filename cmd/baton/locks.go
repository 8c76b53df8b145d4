package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/control/lockctl"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/spf13/cobra"
)

// pager makes calls of one connection, each with the time of a command.
func (t *target) pager(ctx context.Context, a *app) (func(cmd string, args, result any) error, func() error, error) {
	socket, err := t.path(a)
	if err != nil {
		return nil, nil, err
	}
	if ctx == nil {
		ctx = context.Background()
	}
	c, err := control.Dial(ctx, socket)
	if err != nil {
		return nil, nil, err
	}
	return func(cmd string, args, result any) error {
		ctx, cancel := context.WithTimeout(ctx, commandTimeout)
		defer cancel()
		return c.Call(ctx, cmd, args, result)
	}, c.Close, nil
}

// jsonList writes a JSON array whose elements come one after the other.
type jsonList struct {
	w io.Writer
	n int
}

func (l *jsonList) add(v any) error {
	j, err := json.MarshalIndent(v, "  ", "  ")
	if err != nil {
		return err
	}
	sep := "[\n  "
	if l.n > 0 {
		sep = ",\n  "
	}
	l.n++
	_, err = l.w.Write(append([]byte(sep), j...))
	return err
}

func (l *jsonList) end() error {
	s := "\n]\n"
	if l.n == 0 {
		s = "[]\n"
	}
	_, err := io.WriteString(l.w, s)
	return err
}

func (a *app) locksCmd() *cobra.Command {
	var t target
	var asJSON, waiting, unconfirmed bool
	var args lockctl.ListArgs
	cmd := &cobra.Command{
		Use:   "locks",
		Short: "List and release the locks of clients",
		Long: `List the lock table of a running baton: locks, share reservations and requests
that wait, in the order of their ID.

The states are granted; grant-pending: given to a client that waited and has not
yet said that it heard of it; unconfirmed: held before a crash of the server, and
not yet reclaimed; waiting.

A file is shown by a path inside the file system if that is found quickly, else
by its FID. The JSON form is an array of objects with the keys id, fid, path,
kind (read, write, share), start and end (bytes, both included), to_eof, mode and
access (of shares), client, client_addr, svid, oh (hex), address, state, since and
age_ns.`,
		Example: `  baton locks
  baton locks --file /home/mail --waiting
  baton locks --client 192.0.2.77 --json | jq length
  baton locks release 4711`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			switch {
			case waiting && unconfirmed:
				return usagef("give one of --waiting and --unconfirmed")
			case waiting:
				args.State = wire.LockWaiting.String()
			case unconfirmed:
				args.State = wire.LockUnconfirmed.String()
			}
			args.File = strings.TrimPrefix(args.File, insidePrefix)
			call, end, err := t.pager(cmd.Context(), a)
			if err != nil {
				return err
			}
			defer end()
			text, list := status.NewLocksText(a.stdout), &jsonList{w: a.stdout}
			for {
				var page lockctl.ListResult
				if err := call(control.CmdLocks, &args, &page); err != nil {
					return err
				}
				if asJSON {
					for i := range page.Locks {
						err = errors.Join(err, list.add(&page.Locks[i]))
					}
				} else {
					err = text.Add(page.Locks)
				}
				if err != nil {
					return err
				}
				if page.EOF {
					break
				}
				if page.Next <= args.After {
					return fmt.Errorf("%s: the list does not go on after lock %d", control.CmdLocks, args.After)
				}
				args.After = page.Next
			}
			if asJSON {
				return list.end()
			}
			return text.End()
		},
	}
	t.add(cmd)
	fl := cmd.Flags()
	fl.StringVar(&args.File, "file", "", "only locks of this file: a `PATH` inside the file system, or a FID")
	fl.StringVar(&args.Client, "client", "", "only locks of this client: `NAME|ADDR`")
	fl.BoolVar(&waiting, "waiting", false, "only requests that wait")
	fl.BoolVar(&unconfirmed, "unconfirmed", false, "only locks that were not reclaimed after a crash")
	fl.BoolVar(&asJSON, "json", false, "print JSON")
	fl.SortFlags = false
	cmd.AddCommand(a.locksReleaseCmd(), a.locksHostsCmd())
	return cmd
}

func (a *app) locksReleaseCmd() *cobra.Command {
	var t target
	var free lockctl.FreeArgs
	cmd := &cobra.Command{
		Use:   "release {ID... | --client NAME|ADDR}",
		Short: "Take locks away",
		Long: `Take locks away: those with the IDs that "baton locks" shows, or with --client all
that a client holds and waits for, as if it had restarted. What was removed is
printed. Whoever waits for it gets it at once.

The client is not told. If it is alive it still believes in its locks: release
only what belongs to clients that are gone for good, or to programs that were
stopped.`,
		Example: `  baton locks release 4711 4712
  baton locks release --client 192.0.2.77
  baton locks release --client build7 --all-addresses`,
		RunE: func(cmd *cobra.Command, args []string) error {
			var ids []uint64
			for _, s := range args {
				id, err := strconv.ParseUint(s, 10, 64)
				if err != nil || id == 0 {
					return usagef("%q is no ID of a lock; \"baton locks\" shows them", s)
				}
				ids = append(ids, id)
			}
			byClient := cmd.Flags().Changed("client")
			switch {
			case byClient && len(ids) > 0:
				return usagef("give IDs or --client, not both")
			case byClient && free.Client == "":
				return usagef("--client needs a name or an address")
			case !byClient && len(ids) == 0:
				return usagef("say what to release: IDs or --client")
			case !byClient && free.AllAddresses:
				return usagef("--all-addresses goes with --client")
			}
			call, end, err := t.pager(cmd.Context(), a)
			if err != nil {
				return err
			}
			defer end()
			if byClient {
				return a.freeClient(call, &free)
			}
			return a.releaseIDs(call, ids)
		},
	}
	t.add(cmd)
	fl := cmd.Flags()
	fl.StringVar(&free.Client, "client", "", "everything of this client: `NAME|ADDR`")
	fl.BoolVar(&free.AllAddresses, "all-addresses", false, "with --client: towards all service addresses")
	fl.SortFlags = false
	return cmd
}

func (a *app) releaseIDs(call func(string, any, any) error, ids []uint64) error {
	var missing []string
	for len(ids) > 0 {
		n := min(len(ids), lockctl.MaxRelease)
		var res lockctl.ReleaseResult
		if err := call(control.CmdLocksRelease, &lockctl.ReleaseArgs{IDs: ids[:n]}, &res); err != nil {
			return err
		}
		var b bytes.Buffer
		for i := range res.Released {
			fmt.Fprintf(&b, "released %s\n", res.Released[i].String())
		}
		if _, err := a.stdout.Write(b.Bytes()); err != nil {
			return err
		}
		for _, id := range res.Missing {
			missing = append(missing, strconv.FormatUint(id, 10))
		}
		if res.Failed != "" {
			return fmt.Errorf("release: %s", res.Failed)
		}
		ids = ids[n:]
	}
	if len(missing) > 0 {
		return fmt.Errorf("no such lock: %s", strings.Join(missing, ", "))
	}
	return nil
}

func (a *app) freeClient(call func(string, any, any) error, args *lockctl.FreeArgs) error {
	var res lockctl.FreeResult
	if err := call(control.CmdLocksFree, args, &res); err != nil {
		return err
	}
	for _, f := range res.Clients {
		if _, err := fmt.Fprintf(a.stdout, "released %d %s of %s towards %s\n", f.Freed, plural(f.Freed, "entry", "entries"),
			status.ClientName(f.Client, f.ClientAddr), f.Addr); err != nil {
			return err
		}
	}
	if res.Failed != "" {
		return fmt.Errorf("release: %s", res.Failed)
	}
	return nil
}

func plural[N ~uint32 | ~uint64](n N, one, many string) string {
	if n == 1 {
		return one
	}
	return many
}

func (a *app) locksHostsCmd() *cobra.Command {
	var t target
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "hosts",
		Short: "List the clients that are told of restarts",
		Long: `List the clients that are told when the server has restarted (the monitor list of
NSM), per service address: whether they know its present state, the state that
they know, their own state as last heard, and how many locks, shares and waiting
requests they have.

The JSON form is an array of objects with the keys client, client_addr, address,
state, nsm_state, notified_state, notified, locks, since and age_ns.`,
		Example: `  baton locks hosts
  baton locks hosts --json | jq '.[] | select(.notified | not) | .client_addr'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			call, end, err := t.pager(cmd.Context(), a)
			if err != nil {
				return err
			}
			defer end()
			list := &jsonList{w: a.stdout}
			var all []status.LockHost
			for args := (lockctl.HostsArgs{}); ; {
				var page lockctl.HostsResult
				if err := call(control.CmdLockHosts, &args, &page); err != nil {
					return err
				}
				all = append(all, page.Hosts...)
				if page.Next == nil {
					break
				}
				args.After = page.Next
			}
			if !asJSON {
				return status.LockHostsText(a.stdout, all)
			}
			for i := range all {
				if err := list.add(&all[i]); err != nil {
					return err
				}
			}
			return list.end()
		},
	}
	t.add(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().SortFlags = false
	return cmd
}
