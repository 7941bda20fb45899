// SPDX-License-Identifier: Apache-2.0

// Command node is a small kubelet for tests: it registers a Node, takes every pod that has no node of its own, runs
// the pod's containers as local processes, and answers the API server's exec, attach, log and port-forward requests
// over the kubelet's own streaming code.
//
// Images are not looked at: a container without a command sleeps. All pods share this process's network namespace,
// user and file system, each container with a working directory of its own, so relative paths are the container's.
// Only literal environment values are set. There are no volumes, init containers, probes or resource limits.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
)

const (
	// shutdownTimeout bounds the end of all containers.
	shutdownTimeout = 5 * time.Second
	// lingerTimeout is how long a closed connection still takes what comes.
	lingerTimeout = 2 * time.Second
)

func main() {
	var (
		kubeconfig  = flag.String("kubeconfig", "", "how the API server is reached, as somebody who may do everything")
		name        = flag.String("name", "node", "the Node object's name")
		address     = flag.String("address", "127.0.0.1", "where the API server reaches this node, and every pod's address")
		port        = flag.Int("port", 0, "the streaming port; 0 takes a free one")
		certificate = flag.String("certificate", "", "PEM file of the serving certificate")
		key         = flag.String("key", "", "PEM file of its key")
		clientCA    = flag.String("client-ca", "", "PEM file of the authority that the API server's client certificate has")
		directory   = flag.String("directory", "", "where logs and working directories are made")
	)
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, *kubeconfig, *name, *address, *port, *certificate, *key, *clientCA, *directory); err != nil {
		fmt.Fprintf(os.Stderr, "node: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, kubeconfig, name, address string, port int, certificate, key, clientCA, directory string) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	config.QPS, config.Burst = 200, 400
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	tlsConfig, err := serverTLS(certificate, key, clientCA)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", net.JoinHostPort(address, strconv.Itoa(port)))
	if err != nil {
		return err
	}
	n := newNode(client, name, address, listener.Addr().(*net.TCPAddr).Port, directory)
	// upgrades need HTTP/1.1
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	server := &http.Server{
		Handler: n.handler(), TLSConfig: tlsConfig, Protocols: protocols, ReadHeaderTimeout: 10 * time.Second,
	}
	served := make(chan error, 1)
	go func() { served <- server.ServeTLS(lingeringListener{listener}, "", "") }()
	if err := n.register(ctx); err != nil {
		return fmt.Errorf("register the node: %w", err)
	}
	if err := n.followPods(ctx); err != nil {
		return err
	}
	klog.InfoS("ready", "node", name, "address", listener.Addr())
	select {
	case <-ctx.Done():
	case err = <-served:
	}
	_ = server.Close()
	n.stopAll(shutdownTimeout)
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// lingeringListener gives connections that are closed in two steps. A command here is over within a millisecond, while
// frames of its client are still on their way; closed at once, TCP would answer those with a reset, and the reset
// would take the command's output with it.
type lingeringListener struct{ net.Listener }

func (l lingeringListener) Accept() (net.Conn, error) {
	connection, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &lingeringConn{TCPConn: connection.(*net.TCPConn)}, nil
}

type lingeringConn struct {
	*net.TCPConn
	once sync.Once
}

func (c *lingeringConn) Close() error {
	c.once.Do(func() {
		_ = c.CloseWrite()
		go func() {
			_ = c.SetReadDeadline(time.Now().Add(lingerTimeout))
			_, _ = io.Copy(io.Discard, c.TCPConn)
			_ = c.TCPConn.Close()
		}()
	})
	return nil
}

func serverTLS(certificate, key, clientCA string) (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(certificate, key)
	if err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(clientCA)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("no certificate in `%s`", clientCA)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{pair},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    pool,
		MinVersion:   tls.VersionTLS12,
	}, nil
}
