package etcd

import (
	"context"
	"fmt"
	"strings"
	"sync"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// MemberStatus is what a member says of itself.
type MemberStatus struct {
	Endpoint string `json:"endpoint"`
	Name     string `json:"name,omitempty"`
	Version  string `json:"version,omitempty"`
	Leader   bool   `json:"leader,omitempty"` // of the members
	Size     int64  `json:"size,omitempty"`   // of its database, in bytes
	Error    string `json:"error,omitempty"`  // it does not answer, or what is wrong with it
}

// Members asks every endpoint.
func (c *Client) Members(ctx context.Context) []MemberStatus {
	l := make([]MemberStatus, len(c.o.Endpoints))
	names := map[uint64]string{}
	ids := make([]uint64, len(l))
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = c.do(ctx, func(ctx context.Context, cli *clientv3.Client) error {
			r, err := cli.MemberList(ctx)
			if err == nil {
				for _, m := range r.Members {
					names[m.ID] = m.Name
				}
			}
			return err
		}) // without it they have no names
	})
	for i := range l {
		wg.Go(func() {
			m := &l[i]
			m.Endpoint = c.o.Endpoints[i]
			ctx, cancel := context.WithTimeout(ctx, c.o.Timeout)
			defer cancel()
			cli, err := c.get(ctx)
			if err == nil {
				var r *clientv3.StatusResponse
				if r, err = cli.Status(ctx, m.Endpoint); err == nil {
					ids[i] = r.Header.MemberId
					m.Version, m.Size, m.Leader = r.Version, r.DbSize, r.Leader != 0 && r.Leader == r.Header.MemberId
					m.Error = strings.Join(r.Errors, "; ")
				}
			}
			if err != nil {
				m.Error = fmt.Sprintf("no answer: %v", err)
			}
		})
	}
	wg.Wait()
	for i := range l {
		l[i].Name = names[ids[i]]
	}
	return l
}

// Leader is the node that was elected (Election) and its term, "" if there is none.
func (c *Client) Leader(ctx context.Context) (node string, term uint64, err error) {
	kv, _, err := c.look(ctx, c.key(leaderKey))
	if err != nil || kv == nil {
		return "", 0, err
	}
	return string(kv.Value), uint64(kv.CreateRevision), nil
}
