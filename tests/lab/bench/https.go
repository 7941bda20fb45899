// SPDX-License-Identifier: Apache-2.0

// Command https asks an API server over HTTP/1.1, and tells in JSON how long it took:
//
//	https -address HOST:PORT -name NAME -ca FILE get PATH COUNT     # on one kept connection; without -ca not over TLS
//	https ... create PATH COUNT                    # standard input, with NAME replaced by a number, over 8 connections
//	https ... watch PATH COUNT                     # on a connection each; says when they stand, and holds them until
//	                                               # standard input ends
//
// TOKEN in the environment is its bearer token, if it has one. Only the standard library: built by the bench itself.
package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"
)

const (
	creators = 8
	openers  = 16
)

type client struct {
	http  *http.Client
	base  string
	token string
}

func main() {
	address := flag.String("address", "", "host and port")
	name := flag.String("name", "", "the server's name, which its certificate has")
	ca := flag.String("ca", "", "file of the root that its certificate comes from")
	flag.Parse()
	if err := run(*address, *name, *ca, flag.Args()); err != nil {
		fmt.Fprintf(os.Stderr, "https: %v\n", err)
		os.Exit(1)
	}
}

func run(address, name, ca string, words []string) error {
	if len(words) != 3 {
		return fmt.Errorf("verb, path and count are wanted, not `%v`", words)
	}
	scheme, roots := "http", x509.NewCertPool()
	if ca != "" {
		pem, err := os.ReadFile(ca)
		if err != nil {
			return err
		}
		if scheme = "https"; !roots.AppendCertsFromPEM(pem) {
			return fmt.Errorf("no certificate in `%s`", ca)
		}
	}
	count, err := strconv.Atoi(words[2])
	if err != nil {
		return err
	}
	transport := &http.Transport{
		TLSClientConfig:     &tls.Config{RootCAs: roots, ServerName: name, NextProtos: []string{"http/1.1"}},
		MaxIdleConnsPerHost: openers,
		DisableCompression:  true,
		ReadBufferSize:      64 << 10,
	}
	c := client{&http.Client{Transport: transport}, scheme + "://" + address, os.Getenv("TOKEN")}
	switch words[0] {
	case "get":
		return c.get(words[1], count)
	case "create":
		return c.create(words[1], count)
	case "watch":
		return c.watch(words[1], count)
	}
	return fmt.Errorf("no verb `%s`", words[0])
}

func (c client) do(method, path string, body io.Reader) (*http.Response, error) {
	request, err := http.NewRequest(method, c.base+path, body)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Accept", "application/json")
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	if c.token != "" {
		request.Header.Set("Authorization", "Bearer "+c.token)
	}
	answer, err := c.http.Do(request)
	if err == nil && answer.StatusCode >= 300 {
		told, _ := io.ReadAll(answer.Body)
		err = fmt.Errorf("%s %s: %s: %s", method, path, answer.Status, told)
	}
	return answer, err
}

// drain asks, and reads the answer to its end.
func (c client) drain(method, path string, body io.Reader) (int64, error) {
	answer, err := c.do(method, path, body)
	if err != nil {
		return 0, err
	}
	defer answer.Body.Close()
	return io.Copy(io.Discard, answer.Body)
}

func (c client) get(path string, count int) error {
	// the handshake, and what the server does once
	if _, err := c.drain("GET", path, nil); err != nil {
		return err
	}
	took := make([]time.Duration, count)
	var size int64
	began := time.Now()
	for i := range took {
		start := time.Now()
		n, err := c.drain("GET", path, nil)
		if err != nil {
			return err
		}
		took[i] = time.Since(start)
		size += n
	}
	seconds := time.Since(began).Seconds()
	slices.Sort(took)
	return json.NewEncoder(os.Stdout).Encode(map[string]any{
		"seconds": seconds,
		"bytes":   size,
		"p50_us":  float64(took[count/2]) / 1e3,
		"p99_us":  float64(took[count*99/100]) / 1e3,
	})
}

// each calls for every number below count, so many at a time; returns the first error.
func each(count, parallel int, call func(int) error) error {
	var (
		group  sync.WaitGroup
		once   sync.Once
		failed error
	)
	numbers := make(chan int)
	for range parallel {
		group.Add(1)
		go func() {
			defer group.Done()
			for i := range numbers {
				if err := call(i); err != nil {
					once.Do(func() { failed = err })
				}
			}
		}()
	}
	for i := range count {
		numbers <- i
	}
	close(numbers)
	group.Wait()
	return failed
}

func (c client) create(path string, count int) error {
	template, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	return each(count, creators, func(i int) error {
		body := bytes.ReplaceAll(template, []byte("NAME"), []byte(strconv.Itoa(i)))
		_, err := c.drain("POST", path, bytes.NewReader(body))
		return err
	})
}

func (c client) watch(path string, count int) error {
	bodies := make([]io.ReadCloser, count)
	began := time.Now()
	err := each(count, openers, func(i int) error {
		answer, err := c.do("GET", path, nil)
		if err != nil {
			return err
		}
		bodies[i] = answer.Body
		// it stands once it has told of what is there
		_, err = bufio.NewReader(answer.Body).ReadBytes('\n')
		return err
	})
	if err != nil {
		return err
	}
	if err := json.NewEncoder(os.Stdout).Encode(map[string]any{"seconds": time.Since(began).Seconds()}); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	for _, body := range bodies {
		body.Close()
	}
	return err
}
