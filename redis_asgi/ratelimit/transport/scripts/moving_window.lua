-- Moving window: an exact log, one stamp (us) per unit, in a list beside the hash. Field: "last" (us).
-- The cut between expired and live stamps is found by binary search; one call trims a bounded number.
make.m = function()
  local TRIM, CHUNK = 1000, 1000

  local function stamp(s, position)
    return min(tonumber(call('LINDEX', s.list, integer(position))), s.at)
  end

  -- How many of the first stamps are no later than a time.
  local function before(s, time, high)
    local low = 0
    while low < high do
      local middle = floor((low + high) / 2)
      if tonumber(call('LINDEX', s.list, integer(middle))) <= time then low = middle + 1 else high = middle end
    end
    return low
  end

  local function push(s, count)
    local text = integer(s.at)
    for first = 1, count, CHUNK do
      local stamps = {}
      for i = first, min(count, first + CHUNK - 1) do stamps[#stamps + 1] = text end
      call('RPUSH', s.list, unpack(stamps))
    end
    expire(s.list, s.policy.window)
    s.last = s.at
  end

  return {
    load = function(s, raw, now)
      s.last, s.stale = 0, not raw
      if raw then s.last = tonumber((parts(raw, '^(%d+)$'))) end
      s.at, s.moved = now, s.last > now
      -- A log whose field is gone belongs to counters that were reset.
      s.length = raw and call('LLEN', s.list) or 0
      local horizon = s.at - s.policy.window
      s.cut = 0
      if s.length > 0 and stamp(s, 0) <= horizon then s.cut = before(s, horizon, s.length) end
      s.used = s.length - s.cut
      s.free = s.policy.quota - s.used
      s.receipt_now = s.at
    end,
    wait = function(s, cost, now)
      return stamp(s, s.cut + s.used + cost - s.policy.quota - 1) + s.policy.window - now
    end,
    -- Put as many stamps of now in the place of those of the future.
    move = function(s)
      local kept = before(s, s.at, s.length)
      if kept < s.length then
        if kept > 0 then call('LTRIM', s.list, 0, kept - 1) else call('UNLINK', s.list) end
        push(s, s.length - kept)
      end
      s.last = s.at
    end,
    charge = function(s, cost)
      local policy = s.policy
      cost = max(0, min(cost, 10 * policy.quota - s.used))
      if s.stale then call('UNLINK', s.list) end
      local trim = min(s.cut, TRIM + cost)
      if trim > 0 then
        call('LTRIM', s.list, integer(trim), -1)
        s.cut = s.cut - trim
      end
      push(s, cost)
      s.used = s.used + cost
      s.free = policy.quota - s.used
    end,
    refund = function(s, cost, receipt)
      local removed = call('LREM', s.list, integer(-cost), integer(receipt))
      if receipt > s.at - s.policy.window then
        s.used = s.used - removed
        s.free = s.policy.quota - s.used
      else
        -- Before the cut, and so spent already: taking them away gives nothing back.
        s.cut = s.cut - removed
      end
      -- The field, when the last unit came, stays as it is.
      return false
    end,
    reset = function(s, now)
      if s.used == 0 then return 0 end
      return stamp(s, -1) + s.policy.window - now
    end,
    save = function(s, now)
      return integer(s.last), s.last + s.policy.window - now
    end,
  }
end
