-- Concurrency: the requests in flight, a set of their ids beside the hash, each with the end of its lease (us).
-- Field: "last" (us), by which a reset finds the set. A charge renews, and both it and a refund say the same however often
-- they come, and in whatever order those of other ids do.
make.c = function()
  -- When the next place comes free cannot be known.
  local SOON = 1000000

  local function count(s, used)
    s.used = used
    s.free = s.policy.quota - used
  end

  -- Only where something is written all the same: a look and a refusal leave every key as it was.
  local function drop_expired(s) call('ZREMRANGEBYSCORE', s.list, '-inf', integer(s.at)) end

  local function hold(s, ids)
    local till = integer(s.at + s.policy.window)
    local added = 0
    for i = 1, #ids do added = added + call('ZADD', s.list, till, ids[i]) end
    if #ids > 0 then expire(s.list, s.policy.window) end
    return added
  end

  return {
    load = function(s, raw, now)
      s.at = now
      s.moved = raw and parts(raw, '^(%d+)$') + 0 > now
      count(s, call('ZCOUNT', s.list, '(' .. integer(now), '+inf'))
      s.receipt_now = 0
    end,
    wait = function() return SOON end,
    -- Leases that would last for longer than one: their clock was set back.
    move = function(s)
      hold(s, call('ZRANGEBYSCORE', s.list, '(' .. integer(s.at + s.policy.window), '+inf'))
    end,
    charge = function(s)
      drop_expired(s)
      count(s, s.used + hold(s, holders))
    end,
    refund = function(s)
      drop_expired(s)
      local removed = 0
      for i = 1, #holders do removed = removed + call('ZREM', s.list, holders[i]) end
      count(s, s.used - removed)
      -- The field says nothing of how many there are.
      return false
    end,
    reset = function(s) return s.used == 0 and 0 or SOON end,
    save = function(s) return integer(s.at), s.policy.window end,
  }
end
