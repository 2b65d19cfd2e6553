// A dozen operations of go-redis through a sidecar: go run . PORT sentinel|cluster. Says `ok` at the end.
package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"reflect"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

var ctx = context.Background()

// How often a message is published until it is heard: nodes of a Cluster drop it for peers that they have no connection to just then.
const attempts = 10

func same(actual, expected interface{}) {
	if !reflect.DeepEqual(actual, expected) {
		panic(fmt.Sprintf("%#v is not %#v", actual, expected))
	}
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func clients(address, topology string) []redis.UniversalClient {
	all := []redis.UniversalClient{
		redis.NewClient(&redis.Options{Addr: address}),
		redis.NewClient(&redis.Options{Addr: address, Protocol: 2, Username: "any", Password: "any", ClientName: "smoke"}),
		redis.NewFailoverClient(&redis.FailoverOptions{MasterName: "main", SentinelAddrs: []string{address}}),
	}
	if topology == "sentinel" {
		return append(all, redis.NewClient(&redis.Options{Addr: address, DB: 3}))
	}
	return append(all, redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{address}}))
}

func run(client redis.UniversalClient) {
	key := func(name string) string { return "{smoke}:" + name }
	names := []string{key("text"), key("number"), key("hash"), key("list"), key("set"), key("zset"), key("binary")}
	must(client.Del(ctx, names...).Result())
	same(must(client.Set(ctx, key("text"), "value", 100*time.Second).Result()), "OK")
	same(must(client.Get(ctx, key("text")).Result()), "value")
	ttl := must(client.TTL(ctx, key("text")).Result())
	same(ttl > 0 && ttl <= 100*time.Second, true)
	same(must(client.MGet(ctx, key("text"), key("none")).Result()), []interface{}{"value", nil})
	same(must(client.IncrBy(ctx, key("number"), 5).Result()), int64(5))
	same(must(client.HSet(ctx, key("hash"), "a", 1, "b", 2).Result()), int64(2))
	same(must(client.HGetAll(ctx, key("hash")).Result()), map[string]string{"a": "1", "b": "2"})
	same(must(client.RPush(ctx, key("list"), "a", "b", "c").Result()), int64(3))
	same(must(client.BLPop(ctx, time.Second, key("list")).Result()), []string{key("list"), "a"})
	same(must(client.SAdd(ctx, key("set"), "x", "y").Result()), int64(2))
	same(must(client.ZAdd(ctx, key("zset"), redis.Z{Score: 1, Member: "one"}).Result()), int64(1))
	same(must(client.ZRangeWithScores(ctx, key("zset"), 0, -1).Result()), []redis.Z{{Score: 1, Member: "one"}})
	large := bytes.Repeat([]byte("\x00\xff\r\n$-1"), 40000)
	must(client.Set(ctx, key("binary"), large, 0).Result())
	same(must(client.Get(ctx, key("binary")).Bytes()), large)
	pipelined := must(client.TxPipelined(ctx, func(pipe redis.Pipeliner) error {
		pipe.Incr(ctx, key("number"))
		pipe.Get(ctx, key("number"))
		return nil
	}))
	same(pipelined[0].(*redis.IntCmd).Val(), int64(6))
	same(pipelined[1].(*redis.StringCmd).Val(), "6")
	same(must(client.Eval(ctx, "return redis.call('GET', KEYS[1])", []string{key("text")}).Result()), "value")
	err := client.LPush(ctx, key("text"), "x").Err()
	same(err != nil && strings.HasPrefix(err.Error(), "WRONGTYPE"), true)
	same(must(client.Del(ctx, names...).Result()), int64(7))
}

func subscribe(address string) {
	client := redis.NewClient(&redis.Options{Addr: address})
	subscription := client.Subscribe(ctx, "smoke:news")
	must(subscription.Receive(ctx))
	messages, heard := subscription.Channel(), ""
	for attempt := 0; attempt < attempts && heard == ""; attempt++ {
		must(client.Publish(ctx, "smoke:news", "hello").Result())
		select {
		case message := <-messages:
			heard = message.Payload
		case <-time.After(time.Second):
		}
	}
	same(heard, "hello")
	if err := subscription.Close(); err != nil {
		panic(err)
	}
}

func main() {
	address, topology := "127.0.0.1:"+os.Args[1], os.Args[2]
	for _, client := range clients(address, topology) {
		run(client)
		if err := client.Close(); err != nil {
			panic(err)
		}
	}
	subscribe(address)
	fmt.Println("ok")
}
