package tlscreds

import (
	"errors"
	"fmt"
	"net"

	"qblockd/schema/types"
)

// Creds are credentials for one end of connections.
type Creds interface {
	Endpoint() types.QCryptoTLSCredsEndpoint
	// KnowsPeer tells whether who connects has to prove a name: else nobody can be authorized.
	KnowsPeer() bool
	// Server and Client make a connection one under TLS: they do the handshake, which takes as long
	// as the deadlines of nc allow. After an error nc is for the caller to close. host is who the
	// server must be; "" if that is not known.
	Server(nc net.Conn) (*Conn, error)
	Client(nc net.Conn, host string) (*Conn, error)
}

// Authorizer is an object that says who may connect.
type Authorizer interface {
	// Allows tells whether the peer of that name may. It reads files if it has to.
	Allows(name string) (bool, error)
}

// Objects finds objects of object-add.
type Objects interface {
	// Object is the object of that name, nil if there is none.
	Object(id string) any
}

// find looks up credentials for one end.
func find(o Objects, id string, end types.QCryptoTLSCredsEndpoint) (Creds, error) {
	var found any
	if o != nil {
		found = o.Object(id)
	}
	c, ok := found.(Creds)
	switch {
	case found == nil:
		return nil, fmt.Errorf("No TLS credentials with id '%s'", id)
	case !ok:
		return nil, fmt.Errorf("Object with id '%s' is not TLS credentials", id)
	case c.Endpoint() != end:
		return nil, fmt.Errorf("Expected TLS credentials for a %s endpoint", end)
	}
	return c, nil
}

// Server is what a server asks of its clients.
type Server struct {
	creds   Creds
	objects Objects
	authz   *string
}

// NewServer finds the credentials of that name. authz names the object that says who may connect,
// which is looked up when somebody does: until it is there nobody may. Without credentials it
// returns nil.
func NewServer(o Objects, creds, authz *string) (*Server, error) {
	if creds == nil {
		if authz != nil {
			return nil, errors.New("'tls-authz' option requires 'tls-creds' option")
		}
		return nil, nil
	}
	c, err := find(o, *creds, types.QCryptoTLSCredsEndpointServer)
	if err != nil {
		return nil, err
	}
	if authz != nil && !c.KnowsPeer() {
		return nil, fmt.Errorf("'tls-authz' option requires TLS credentials with 'verify-peer': "+
			"those with id '%s' do not know who connects", *creds)
	}
	return &Server{c, o, authz}, nil
}

// Accept makes the connection of a client one under TLS, if the client may connect. It takes as
// long as the deadlines of nc allow. After an error nc is for the caller to close.
func (s *Server) Accept(nc net.Conn) (*Conn, error) {
	c, err := s.creds.Server(nc)
	if err != nil {
		return nil, err
	}
	if s.authz != nil {
		if err := s.authorize(c.Peer()); err != nil {
			c.goodbye()
			return nil, err
		}
	}
	return c, nil
}

// authorize looks the peer up.
func (s *Server) authorize(peer string) error {
	switch a := s.objects.Object(*s.authz).(type) {
	case nil:
		return fmt.Errorf("Cannot find QAuthZ object ID %s", *s.authz)
	case Authorizer:
		ok, err := a.Allows(peer)
		if err == nil && !ok {
			err = fmt.Errorf("TLS x509 authz check for %s is denied", peer)
		}
		return err
	}
	return fmt.Errorf("Object '%s' is not a QAuthZ subclass", *s.authz)
}

// Client is how one connects to servers.
type Client struct {
	creds Creds
	host  string
}

// NewClient finds the credentials of that name. host is who the server must be; "" if that is not
// known.
func NewClient(o Objects, creds, host string) (*Client, error) {
	c, err := find(o, creds, types.QCryptoTLSCredsEndpointClient)
	if err != nil {
		return nil, err
	}
	return &Client{c, host}, nil
}

// Connect makes a connection one under TLS. It takes as long as the deadlines of nc allow. After an
// error nc is for the caller to close.
func (c *Client) Connect(nc net.Conn) (*Conn, error) { return c.creds.Client(nc, c.host) }
