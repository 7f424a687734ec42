// Private networking: a virtual network for people and tools, and in it an address of each part. Join it by VPN,
// peering or a jump host; the clusters and endpoints have the workspace's managed network and need nothing here.
param name string
param location string
param tags object
param addressPrefix string
param subnetPrefix string
param workspaceId string
param storageId string
param vaultId string
param registryId string

// A part, its group, and the names under which clients look for it.
var parts = [
  {
    name: 'workspace'
    id: workspaceId
    group: 'amlworkspace'
    zones: [
      'privatelink.api.azureml.ms'
      'privatelink.notebooks.azure.net'
    ]
  }
  {
    name: 'blob'
    id: storageId
    group: 'blob'
    zones: [
      'privatelink.blob.${environment().suffixes.storage}'
    ]
  }
  {
    name: 'file'
    id: storageId
    group: 'file'
    zones: [
      'privatelink.file.${environment().suffixes.storage}'
    ]
  }
  {
    name: 'vault'
    id: vaultId
    group: 'vault'
    zones: [
      'privatelink.vaultcore.azure.net'
    ]
  }
  {
    name: 'registry'
    id: registryId
    group: 'registry'
    zones: [
      'privatelink.azurecr.io'
    ]
  }
]

resource rules 'Microsoft.Network/networkSecurityGroups@2023-11-01' = {
  name: 'nsg-${name}'
  location: location
  tags: tags
  properties: {
    securityRules: [
      {
        name: 'https-from-within'
        properties: {
          priority: 100
          direction: 'Inbound'
          access: 'Allow'
          protocol: 'Tcp'
          sourceAddressPrefix: 'VirtualNetwork'
          sourcePortRange: '*'
          destinationAddressPrefix: 'VirtualNetwork'
          destinationPortRange: '443'
        }
      }
      {
        name: 'nothing-else'
        properties: {
          priority: 4096
          direction: 'Inbound'
          access: 'Deny'
          protocol: '*'
          sourceAddressPrefix: '*'
          sourcePortRange: '*'
          destinationAddressPrefix: '*'
          destinationPortRange: '*'
        }
      }
    ]
  }
}

resource network 'Microsoft.Network/virtualNetworks@2023-11-01' = {
  name: 'vnet-${name}'
  location: location
  tags: tags
  properties: {
    addressSpace: {
      addressPrefixes: [
        addressPrefix
      ]
    }
    subnets: [
      {
        name: 'private-endpoints'
        properties: {
          addressPrefix: subnetPrefix
          networkSecurityGroup: {
            id: rules.id
          }
          privateEndpointNetworkPolicies: 'Enabled'
        }
      }
    ]
  }
}

module links 'privatelink.bicep' = [for part in parts: {
  name: 'private-${part.name}'
  params: {
    name: 'pe-${name}-${part.name}'
    location: location
    tags: tags
    networkId: network.id
    subnetId: '${network.id}/subnets/private-endpoints'
    targetId: part.id
    group: part.group
    zones: part.zones
  }
}]

output networkId string = network.id
