// SPDX-License-Identifier: Apache-2.0

// Command goclient does with client-go what Go programs do with a cluster, and prints what they see:
//
//	goclient -kubeconfig FILE [-namespace NS] [-protobuf] list configmaps|secrets|pods
//	goclient ... watch COUNT                # an informer on ConfigMaps, until it has told COUNT events
//	goclient ... exec POD COMMAND...        # WebSocket, and SPDY where that is refused; stdin is passed on
//	goclient ... apply NAME KEY VALUE       # server-side apply of a ConfigMap
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/httpstream"
	applyv1 "k8s.io/client-go/applyconfigurations/core/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/remotecommand"
	utilexec "k8s.io/client-go/util/exec"
)

const timeout = 60 * time.Second

func main() {
	var (
		kubeconfig = flag.String("kubeconfig", "", "path of the kubeconfig")
		namespace  = flag.String("namespace", "default", "namespace")
		protobuf   = flag.Bool("protobuf", false, "ask for protobuf, as controllers do, and send it")
	)
	flag.Parse()
	err := run(*kubeconfig, *namespace, *protobuf, flag.Args())
	var exit utilexec.CodeExitError
	switch {
	case errors.As(err, &exit):
		os.Exit(exit.Code)
	case err != nil:
		fmt.Fprintf(os.Stderr, "goclient: %v\n", err)
		os.Exit(1)
	}
}

func run(kubeconfig, namespace string, protobuf bool, words []string) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	if protobuf {
		config.ContentType = "application/vnd.kubernetes.protobuf"
		config.AcceptContentTypes = "application/vnd.kubernetes.protobuf,application/json"
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	switch {
	case len(words) == 2 && words[0] == "list":
		return list(ctx, client, namespace, words[1])
	case len(words) == 2 && words[0] == "watch":
		count, err := strconv.Atoi(words[1])
		if err != nil {
			return err
		}
		return watch(ctx, client, namespace, count)
	case len(words) >= 3 && words[0] == "exec":
		return execute(ctx, config, client, namespace, words[1], words[2:])
	case len(words) == 4 && words[0] == "apply":
		wanted := applyv1.ConfigMap(words[1], namespace).WithData(map[string]string{words[2]: words[3]})
		made, err := client.CoreV1().ConfigMaps(namespace).Apply(ctx, wanted, metav1.ApplyOptions{FieldManager: "goclient"})
		if err != nil {
			return err
		}
		tell("configmap", made.Name, made.Data)
		return nil
	default:
		return fmt.Errorf("cannot do `%v`", words)
	}
}

func tell[V any](kind, name string, data map[string]V) {
	fmt.Printf("%s %s", kind, name)
	for _, key := range slices.Sorted(maps.Keys(data)) {
		fmt.Printf(" %s=%s", key, any(data[key]))
	}
	fmt.Println()
}

func list(ctx context.Context, client kubernetes.Interface, namespace, resource string) error {
	switch resource {
	case "configmaps":
		found, err := client.CoreV1().ConfigMaps(namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, one := range found.Items {
			tell("configmap", one.Name, one.Data)
		}
	case "secrets":
		found, err := client.CoreV1().Secrets(namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, one := range found.Items {
			tell("secret", one.Name, one.Data)
		}
	case "pods":
		found, err := client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, one := range found.Items {
			fmt.Printf("pod %s %s\n", one.Name, one.Status.Phase)
		}
	default:
		return fmt.Errorf("cannot list `%s`", resource)
	}
	return nil
}

func watch(ctx context.Context, client kubernetes.Interface, namespace string, count int) error {
	events := make(chan string)
	send := func(what string) func(any) {
		return func(object any) {
			if gone, ok := object.(cache.DeletedFinalStateUnknown); ok {
				object = gone.Obj
			}
			if one, ok := object.(*v1.ConfigMap); ok {
				select {
				case events <- what + " " + one.Name:
				case <-ctx.Done():
				}
			}
		}
	}
	factory := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace(namespace))
	informer := factory.Core().V1().ConfigMaps().Informer()
	changed := send("changed")
	if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: send("added"), UpdateFunc: func(_, object any) { changed(object) }, DeleteFunc: send("deleted"),
	}); err != nil {
		return err
	}
	factory.Start(ctx.Done())
	for range count {
		select {
		case event := <-events:
			fmt.Println(event)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func execute(ctx context.Context, config *rest.Config, client kubernetes.Interface, namespace, pod string, command []string) error {
	request := client.CoreV1().RESTClient().Post().Resource("pods").Namespace(namespace).Name(pod).SubResource("exec").
		VersionedParams(&v1.PodExecOptions{Command: command, Stdin: true, Stdout: true, Stderr: true}, scheme.ParameterCodec)
	spdy, err := remotecommand.NewSPDYExecutor(config, "POST", request.URL())
	if err != nil {
		return err
	}
	websocket, err := remotecommand.NewWebSocketExecutor(config, "GET", request.URL().String())
	if err != nil {
		return err
	}
	executor, err := remotecommand.NewFallbackExecutor(websocket, spdy, func(err error) bool {
		return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
	})
	if err != nil {
		return err
	}
	return executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr})
}
