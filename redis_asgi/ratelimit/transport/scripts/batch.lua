-- Decide many requests in one call, each in turn, all or nothing, each under its own pcall.
-- A request makes charges; a charge is some policies of one partition at one cost.
-- KEYS, per charge: the partition's hash, then the list of each moving window and the set of each concurrency limit.
--   All keys of a call share a slot on Redis Cluster, where a batch is one call per partition.
-- ARGV[1] the number of this call; ARGV[2] now (us), '' = Redis TIME. Then per request: mode (consume|peek|charge|refund),
--   number of charges, per charge: its policies, a line "<strategy> <quota> <window us> <shadow 0|1> <field>" each, and its
--   cost (units; -1 = what remains of the least of its enforcing policies, at least 1); for a refund then a receipt per
--   counter, negative for one that was not charged; but for a peek, where a policy counts what is in flight, then the ids
--   that it is about, apart by blanks. A quota of 0 refuses every cost, 0 included.
-- Reply: the number of the call, then per request, as a list: 1 admitted | 0 refused, then per counter: 1|0 itself admits
--   (at a cost of what remains: that), remaining (units), reset (us), until the same cost, or 1 of what remains, is admitted
--   next (us, -1 = can never fit), receipt (us). In place of the list of one that failed: its message.

local parsed = {}

local function parse(spec)
  local policies = {}
  for letter, quota, window, shadow, field in string.gmatch(spec, '(%a) (%d+) (%d+) ([01]) ([^\n]+)') do
    local strategy = made[letter]
    if not strategy then
      strategy = make[letter]()
      made[letter] = strategy
    end
    policies[#policies + 1] = {
      strategy = strategy, log = letter == 'm' or letter == 'c', holds = letter == 'c',
      quota = tonumber(quota), window = tonumber(window), shadow = shadow == '1', field = field,
      edge = quota * 1e-12, dust = max(1e-9, quota * 1e-12),
    }
  end
  parsed[spec] = policies
  return policies
end

local function read_time()
  local time = call('TIME')
  return time[1] * 1000000 + time[2]
end

-- Neighbours in one hash are read by one HMGET and written by one HSET.
local function read(counters, count, now)
  local i = 1
  while i <= count do
    local key, last = counters[i].key, i
    while last < count and counters[last + 1].key == key do last = last + 1 end
    if last == i then
      local s = counters[i]
      s.strategy.load(s, call('HGET', key, s.policy.field), now)
    else
      local fields = {}
      for j = i, last do fields[j - i + 1] = counters[j].policy.field end
      local raws = call('HMGET', key, unpack(fields))
      for j = i, last do
        local s = counters[j]
        s.strategy.load(s, raws[j - i + 1], now)
      end
    end
    i = last + 1
  end
end

local function write(counters, count, now)
  local i = 1
  if count == 1 then
    local s = counters[1]
    local packed, needed = s.strategy.save(s, now)
    call('HSET', s.key, s.policy.field, packed)
    return expire(s.key, needed)
  end
  while i <= count do
    local key, fields, ttl = counters[i].key, {}, 0
    while i <= count and counters[i].key == key do
      local s = counters[i]
      if s.dirty then
        local packed, needed = s.strategy.save(s, now)
        fields[#fields + 1] = s.policy.field
        fields[#fields + 1] = packed
        ttl = max(ttl, needed)
      end
      i = i + 1
    end
    if #fields > 0 then
      call('HSET', key, unpack(fields))
      expire(key, ttl)
    end
  end
end

-- Give the counters of each charge that takes what remains their cost; a shadow policy has no say in it.
local function price(counters, count)
  local i = 1
  while i <= count do
    local part, last = counters[i].part, i
    while last < count and counters[last + 1].part == part do last = last + 1 end
    if part > 0 then
      local least, watched
      for j = i, last do
        local s = counters[j]
        if s.policy.shadow then watched = min(watched or s.free, s.free) else least = min(least or s.free, s.free) end
      end
      for j = i, last do counters[j].cost = max(1, least or watched) end
    end
    i = last + 1
  end
end

local function decide(mode, counters, count, now, takes_rest)
  local admitted, changed = true, false
  read(counters, count, now)
  if takes_rest then price(counters, count) end
  for i = 1, count do
    local s = counters[i]
    s.ok = (s.cost == 0 or s.cost <= s.free) and s.policy.quota > 0
    if not s.ok and not s.policy.shadow then admitted = false end
  end
  if mode ~= 'peek' then
    for i = 1, count do
      local s = counters[i]
      if s.policy.quota > 0 then
        local strategy = s.strategy
        if s.moved then
          -- By a refusal too: one who is refused for ever would else be refused until the clock is there again.
          if strategy.move then strategy.move(s) end
          s.dirty = true
        end
        if s.cost > 0 then
          if mode == 'refund' then s.dirty = s.receipt >= 0 and strategy.refund(s, s.cost, s.receipt) or s.dirty
          elseif mode == 'charge' or (admitted and s.ok) then
            strategy.charge(s, s.cost)
            s.dirty = true
          end
        end
        changed = changed or s.dirty
      end
    end
    if changed then write(counters, count, now) end
  end
  local reply, n = {admitted and 1 or 0}, 1
  for i = 1, count do
    local s = counters[i]
    local cost, free, quota = s.cost, s.free, s.policy.quota
    reply[n + 1] = s.ok and 1 or 0
    if s.part > 0 then
      if s.ok then reply[n + 1] = cost end
      cost = 1
    end
    reply[n + 2] = free < 0 and 0 or free > quota and quota or free
    reply[n + 3] = quota == 0 and 0 or s.strategy.reset(s, now)
    if quota == 0 then reply[n + 4] = -1
    elseif cost == 0 or cost <= free then reply[n + 4] = 0
    elseif cost > quota then reply[n + 4] = -1
    else reply[n + 4] = s.strategy.wait(s, cost, now) end
    reply[n + 5] = s.receipt_now
    n = n + 5
  end
  return reply
end

local now = ARGV[2] == '' and read_time() or tonumber(ARGV[2])
local k, a, counters, replies, size = 1, 3, {}, {tonumber(ARGV[1])}, 1
while a <= #ARGV do
  local mode, charges = ARGV[a], tonumber(ARGV[a + 1])
  local count, takes_rest, holds = 0, false, false
  a = a + 2
  for part = 1, charges do
    local spec, cost, key = ARGV[a], tonumber(ARGV[a + 1]), KEYS[k]
    a, k = a + 2, k + 1
    if cost < 0 then takes_rest = true else part = 0 end
    local policies = parsed[spec] or parse(spec)
    for i = 1, #policies do
      local policy = policies[i]
      count = count + 1
      local s = counters[count]
      if not s then
        -- Made once for all requests of the batch, and at its full size: as dear as the rest of a decision.
        s = {
          policy = false, strategy = false, cost = 0, key = '', at = 0, free = 0, ok = false, receipt_now = 0,
          part = 0, dirty = false, moved = false, start = 0, count = 0, opened = false,
        }
        counters[count] = s
      end
      s.policy, s.strategy, s.cost, s.key, s.part = policy, policy.strategy, cost, key, part
      s.dirty, s.moved = false, false
      if policy.log then
        s.list = KEYS[k]
        k = k + 1
        holds = holds or policy.holds
      end
    end
  end
  if mode == 'refund' then
    for i = 1, count do counters[i].receipt = tonumber(ARGV[a + i - 1]) end
    a = a + count
  end
  if holds and mode ~= 'peek' then
    holders = {}
    for id in string.gmatch(ARGV[a], '%S+') do holders[#holders + 1] = id end
    a = a + 1
  end
  local fine, result = pcall(decide, mode, counters, count, now, takes_rest)
  -- Redis 7 raises a table, 6.2 a string.
  if not fine then result = type(result) == 'table' and result.err or tostring(result) end
  size = size + 1
  replies[size] = result
end
return replies
